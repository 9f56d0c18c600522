"""Writes `fixtures/`: tiny SAEs saved by the real libraries, with what those compute from them.

```
python tests/sae/make_fixtures.py saelens    # by an interpreter with sae-lens
python tests/sae/make_fixtures.py sparsify   # by an interpreter with eai-sparsify
```
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


FIXTURES = Path(__file__).parent / "fixtures"
D_IN, D_SAE, K = 8, 32, 4


def inputs() -> torch.Tensor:
    return 2 * torch.randn(16, D_IN, generator=torch.Generator().manual_seed(1))


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        scale = 0.2 if name in ("threshold", "r_mag") else 0.5
        parameter.data = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def save_expected(folder: Path, x: torch.Tensor, latents: torch.Tensor, reconstruction: torch.Tensor) -> None:
    expected = {"inputs": x, "latents": latents, "reconstruction": reconstruction}
    save_file({k: v.detach().float().contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


def make_saelens() -> None:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    def build(registry, architecture, **options):
        cls, config = registry(architecture)
        metadata = SAEMetadata(model_name="gpt2", hook_name="blocks.5.hook_resid_post")
        sae = cls(config(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **options))
        randomise(sae)
        return sae

    def expect(folder, sae=None):
        sae = SAE.load_from_disk(folder, dtype="float32") if sae is None else sae
        x = inputs()
        with torch.no_grad():
            latents = sae.encode(x)
            save_expected(folder, x, latents, sae.decode(latents))

    saes = {
        "topk": build(get_sae_class, "topk", k=K),
        "topk_rescaled": build(get_sae_class, "topk", k=K, rescale_acts_by_decoder_norm=True),
        "jumprelu": build(get_sae_class, "jumprelu"),
        "standard": build(get_sae_class, "standard"),
        "standard_uncentred": build(get_sae_class, "standard", apply_b_dec_to_input=False),
        "standard_bfloat16": build(get_sae_class, "standard", dtype="bfloat16"),
        "gated": build(get_sae_class, "gated"),
        "gated_uncentred": build(get_sae_class, "gated", apply_b_dec_to_input=False),
    }
    for name, sae in saes.items():
        sae.save_model(FIXTURES / "saelens" / name)
        expect(FIXTURES / "saelens" / name)

    for name, options in {"batchtopk": {}, "matryoshka_batchtopk": {"matryoshka_widths": [8, 16, D_SAE]}}.items():
        sae = build(get_sae_training_class, name, k=float(K), **options)
        sae.topk_threshold.fill_(1.5)
        sae.save_model(FIXTURES / "saelens" / f"{name}_checkpoint")
        sae.save_inference_model(FIXTURES / "saelens" / name)
        expect(FIXTURES / "saelens" / name)
        expect(FIXTURES / "saelens" / f"{name}_checkpoint", SAE.load_from_disk(FIXTURES / "saelens" / name))

    # A checkpoint of a run whose input scaling is not folded in yet.
    folder, factor = FIXTURES / "saelens" / "topk_scaled_checkpoint", 0.7
    sae = build(get_sae_training_class, "topk", k=K, normalize_activations="expected_average_only_in")
    sae.save_model(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor, "has_whitening": False}))
    loaded = TrainingSAE.load_from_disk(folder)
    with torch.no_grad():
        latents = loaded.encode(inputs() * factor)
        save_expected(folder, inputs(), latents, loaded.decode(latents) / factor)


def make_sparsify() -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    for hookpoint, options in {"layers.5": {"num_latents": D_SAE}, "h.3": {"expansion_factor": D_SAE // D_IN}}.items():
        coder = SparseCoder(D_IN, SparseCoderConfig(k=K, **options))
        randomise(coder)
        folder = FIXTURES / "sparsify" / hookpoint
        coder.save_to_disk(folder)
        x = inputs()
        with torch.no_grad():
            top = coder.encode(x)
            latents = torch.zeros(len(x), D_SAE).scatter_(-1, top.top_indices, top.top_acts)
            save_expected(folder, x, latents, coder.decode(top.top_acts, top.top_indices))


if __name__ == "__main__":
    {"saelens": make_saelens, "sparsify": make_sparsify}[sys.argv[1]]()
