"""Files of SAELens and sparsify, made by those libraries (make_fixtures.py), against what they computed from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.formats import from_saelens, from_sparsify, read_folder, to_saelens
from hf_gradtools.sae.formats.saelens import hook_name_of, hookpoint_of
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.pairs import write_pair


FIXTURES = Path(__file__).parent / "fixtures"
SAELENS = sorted(path.name for path in (FIXTURES / "saelens").iterdir())
SPARSIFY = sorted(path.name for path in (FIXTURES / "sparsify").iterdir())
D_IN, D_SAE, K = 8, 32, 4
ACTIVATIONS = ["topk", "batchtopk", "jumprelu", "relu", "gated"]


def encode(fields: dict[str, Any], state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Latents by the definitions, in float64, a token at a time."""
    w = {name: tensor.double() for name, tensor in state.items()}
    rows = []
    for token in x.double():
        gate = w["W_enc"] @ (token - w["b_dec"] * fields.get("apply_b_dec_to_input", True))
        pre = gate + w["b_enc"]
        if fields["activation"] == "topk":
            kept = pre >= pre.sort(descending=True).values[fields["k"] - 1]
            row = torch.where(kept & (pre > 0), pre, 0.0)
        elif fields["activation"] == "gated":
            row = torch.relu(gate * w["r_mag"].exp() + w["b_mag"]) * (pre > 0)
        else:
            row = torch.where(pre > w.get("threshold", torch.zeros(())), pre, 0.0)
        rows.append(row)
    return torch.stack(rows)


def decode(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    return latents @ state["W_dec"].double() + state["b_dec"].double()


def write(folder: Path, fields: dict[str, Any], state: dict[str, Tensor]) -> None:
    sae = SAE(SAEConfig.from_dict(fields))
    sae.load_state_dict(state, assign=True)
    write_pair(sae, folder)


def random_sae(activation: str, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_SAE, D_IN), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    if activation in ("batchtopk", "jumprelu"):
        shapes["threshold"] = (1,) if options.get("shared_threshold") else (D_SAE,)
    if activation == "gated":
        shapes |= {"r_mag": (D_SAE,), "b_mag": (D_SAE,)}
    state = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "threshold" in state:
        state["threshold"] = state["threshold"].abs()
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "activation": activation, "k": K}
    config = SAEConfig(**sizes, hookpoint="layers.5", model_name="gpt2", **options)
    return config.to_dict(), state


def saelens_files(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = FIXTURES / "saelens" / name
    return json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")


# ---- files of the libraries


@pytest.mark.parametrize("folder", [f"saelens/{name}" for name in SAELENS] + [f"sparsify/{name}" for name in SPARSIFY])
def test_what_a_library_saved_computes_the_same_here(folder):
    fields, state = read_folder(FIXTURES / folder)
    expected = load_file(FIXTURES / folder / "expected.safetensors")
    latents = encode(fields, state, expected["inputs"])
    assert 0 < (latents > 0).float().mean() < 0.7
    torch.testing.assert_close(latents, expected["latents"].double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode(state, latents), expected["reconstruction"].double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folder", [f"saelens/{name}" for name in SAELENS] + ["sparsify/layers.5"])
def test_our_module_computes_what_the_library_did(folder):
    fields, state = read_folder(FIXTURES / folder)
    sae = SAE(SAEConfig.from_dict(fields)).eval()
    sae.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    expected = load_file(FIXTURES / folder / "expected.safetensors")
    with torch.no_grad():
        latents, output = sae.encode(expected["inputs"]), sae(expected["inputs"])
    torch.testing.assert_close(latents, expected["latents"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.reconstruction, expected["reconstruction"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SAELENS)
def test_fields_of_a_saelens_file(name):
    fields, state = read_folder(FIXTURES / "saelens" / name)
    their_metadata = fields.pop("metadata")["saelens"]
    assert their_metadata["sae_lens_version"] == "6.54.12"
    activation = {"standard": "relu", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}
    first = name.split("_")[0]
    expected = {"d_in": D_IN, "d_sae": D_SAE, "activation": activation.get(first, first)}
    expected |= {"hookpoint": "layers.5", "model_name": "gpt2"} | ({"k": K} if first == "topk" else {})
    expected |= {"matryoshka_widths": [8, 16, D_SAE]} if first == "matryoshka" else {}
    expected["apply_b_dec_to_input"] = "uncentred" not in name
    assert fields == expected
    SAEConfig.from_dict(fields)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16 if "bfloat16" in name else torch.float32}


def test_a_sparsify_folder_names_its_hookpoint():
    assert [read_folder(FIXTURES / "sparsify" / name)[0]["hookpoint"] for name in SPARSIFY] == ["layers.3", "layers.5"]


def test_half_precision_weights_with_a_fold_come_back_in_float32():
    cfg, tensors = saelens_files("standard_bfloat16")
    _, state = from_saelens(cfg | {"normalize_activations": "expected_average_only_in"}, tensors, scaling_factor=0.7)
    torch.testing.assert_close(state["b_dec"], tensors["b_dec"].float() / 0.7, atol=1e-6, rtol=0)


def test_what_else_saelens_says_is_kept_and_written_back():
    cfg, tensors = saelens_files("topk")
    cfg["metadata"] |= {"prepend_bos": True, "context_size": 128}
    fields, state = from_saelens(cfg, tensors)
    metadata = to_saelens(SAEConfig.from_dict(fields).to_dict(), state)[0]["metadata"]
    assert {name: metadata[name] for name in ("prepend_bos", "context_size")} == {
        "prepend_bos": True,
        "context_size": 128,
    }


def test_a_file_from_before_saelens_6():
    cfg, tensors = saelens_files("topk")
    old = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "architecture": "standard", "model_name": "gpt2-small",
        "hook_point": "blocks.3.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
        "normalize_activations": False, "prepend_bos": True,
    }  # fmt: skip
    fields, state = from_saelens(old, tensors | {"scaling_factor": torch.ones(D_SAE)})
    assert fields == {
        "d_in": D_IN, "d_sae": D_SAE, "activation": "topk", "k": K, "hookpoint": "layers.2",
        "model_name": "gpt2-small", "apply_b_dec_to_input": True, "metadata": {"saelens": {"prepend_bos": True}},
    }  # fmt: skip
    assert all(torch.equal(state[name], tensor) for name, tensor in from_saelens(cfg, tensors)[1].items())


# ---- our own files


OURS = [(activation, {}) for activation in ACTIVATIONS]
OURS += [("jumprelu", {"shared_threshold": True}), ("topk", {"apply_b_dec_to_input": False})]
OURS += [("batchtopk", {"matryoshka_widths": (8, D_SAE), "metadata": {"tokens": 1000}})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "options"), OURS)
def test_round_trip_through_a_folder_is_exact(activation, options, dtype, tmp_path):
    fields, state = random_sae(activation, **options)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    write(tmp_path / "layers.5", fields, state)
    assert sorted(path.name for path in (tmp_path / "layers.5").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    read_fields, read_state = read_folder(tmp_path / "layers.5")
    assert read_fields == fields
    assert read_state.keys() == state.keys()
    assert all(torch.equal(read_state[name], state[name]) for name in state)
    assert all(tensor.is_contiguous() for tensor in read_state.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_our_files_have_the_keys_and_tensors_of_saelens(activation):
    cfg, tensors = to_saelens(*random_sae(activation))
    fixture = {"relu": "standard", "batchtopk": "jumprelu"}.get(activation, activation)
    their_cfg, their_tensors = saelens_files(fixture)
    assert set(cfg) - {"hf_gradtools"} == set(their_cfg)
    assert cfg["architecture"] == their_cfg["architecture"]
    assert cfg["metadata"]["hook_name"] == their_cfg["metadata"]["hook_name"]
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in their_tensors.items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_our_block_the_same_file_is_one_of_saelens(activation):
    fields, state = random_sae(activation)
    cfg, tensors = to_saelens(fields, state)
    del cfg["hf_gradtools"]
    read_fields, read_state = from_saelens(cfg, tensors)
    assert read_fields["activation"] == ("jumprelu" if activation == "batchtopk" else activation)
    assert read_fields["hookpoint"] == "layers.5"
    assert all(torch.equal(read_state[name], state[name]) for name in state)


def test_saelens_loads_what_we_save(tmp_path):
    python = os.environ.get("HF_GRADTOOLS_SAELENS_PYTHON")
    if not python:
        pytest.skip("HF_GRADTOOLS_SAELENS_PYTHON names no interpreter that has sae_lens")
    arguments = []
    for number, (activation, options) in enumerate(OURS):
        fields, state = random_sae(activation, **options)
        x = 2 * torch.randn(16, D_IN, generator=torch.Generator().manual_seed(1))
        latents = encode(fields, state, x)
        expected = {"inputs": x, "latents": latents.float(), "reconstruction": decode(state, latents).float()}
        write(tmp_path / str(number), fields, state)
        save_file(expected, tmp_path / f"{number}.safetensors")
        arguments += [tmp_path / str(number), tmp_path / f"{number}.safetensors"]
    script = Path(__file__).parent / "check_in_saelens.py"
    result = subprocess.run([python, script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_write_that_fails_leaves_the_folder_as_it_was(tmp_path):
    fields, state = random_sae("jumprelu")
    write(tmp_path, fields, state)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="threshold has entries below 0"):
        write(tmp_path, fields, state | {"threshold": -state["threshold"]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("hookpoint", "hook_name"),
    [("layers.5", "blocks.5.hook_resid_post"), ("layers.12.mlp", "layers.12.mlp"), (None, None)],
)
def test_hook_names_both_ways(hookpoint, hook_name):
    assert hook_name_of(hookpoint) == hook_name
    assert hookpoint_of(hook_name) == hookpoint


def test_the_stream_before_a_block_is_the_output_of_the_one_before():
    assert hookpoint_of("blocks.5.hook_resid_pre") == "layers.4"
    assert hookpoint_of("blocks.0.hook_resid_pre") == "blocks.0.hook_resid_pre"  # the embeddings: no block's output


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "architecture='temporal' cannot be represented exactly"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' cannot be represented exactly"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations='covariance_whitening' cannot"),
        ({"normalize_activations": "expected_average_only_in"}, "scaling_factor is None"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' cannot be represented exactly"),
        ({"metadata": None, "activation_fn": "tanh-relu"}, "activation_fn='tanh-relu' cannot be represented exactly"),
        ({"k": 33}, r"k=33 is not .*\[1, d_sae=32\]"),
        ({"k": None}, "cfg.json has no 'k'"),
        ({"d_in": None}, "cfg.json has no 'd_in'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"d_sae": 31}, r"W_enc is \(8, 32\) instead of \(8, 31\)"),
    ],
)
def test_a_saelens_file_that_is_not_representable_is_refused_by_name(change, message):
    cfg, tensors = saelens_files("topk")
    with pytest.raises(ValueError, match=message):
        from_saelens(cfg | change, tensors)


def test_a_scaling_factor_for_unscaled_inputs_is_refused():
    with pytest.raises(ValueError, match="scaling_factor=0.5 is given for an SAE with normalize_activations='none'"):
        from_saelens(*saelens_files("topk"), scaling_factor=0.5)


def test_finetuned_latents_are_refused():
    cfg, tensors = saelens_files("standard")
    with pytest.raises(ValueError, match="'scaling_factor'"):
        from_saelens(cfg, tensors | {"scaling_factor": torch.full((D_SAE,), 2.0)})


@pytest.mark.parametrize("name", SAELENS)
def test_missing_and_extra_tensors_are_named(name):
    cfg, tensors = saelens_files(name)
    factor = 0.7 if "scaled" in name.split("_") else None
    for missing in tensors:
        rest = {key: tensor for key, tensor in tensors.items() if key != missing}
        with pytest.raises(ValueError, match=rf"{missing} \(.*\) is missing"):
            from_saelens(cfg, rest, scaling_factor=factor)
    with pytest.raises(ValueError, match=r"W_skip \(8, 8\) is not expected"):
        from_saelens(cfg, tensors | {"W_skip": torch.zeros(8, 8)}, scaling_factor=factor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "groupmax"}, "activation='groupmax' in sparsify's cfg.json cannot be represented exactly"),
        ({"skip_connection": True}, "skip_connection=True"),
        ({"transcode": True}, "transcode=True"),
        ({"signed": True}, "signed=True"),
        ({"k": 0}, r"k=0 .* not in \[1, 32\]"),
        ({"d_in": None}, "does not describe a coder of sparsify"),
        ({"num_latents": 16}, r"encoder.weight is \(32, 8\) instead of \(16, 8\)"),
    ],
)
def test_a_sparsify_file_that_is_not_representable_is_refused_by_name(change, message):
    folder = FIXTURES / "sparsify" / "layers.5"
    cfg = json.loads((folder / "cfg.json").read_text())
    with pytest.raises(ValueError, match=message):
        from_sparsify(cfg | change, load_file(folder / "sae.safetensors"))


def test_our_own_state_is_checked_before_it_is_saved():
    fields, state = random_sae("topk")
    with pytest.raises(ValueError, match=r"threshold \(32,\) is not expected"):
        to_saelens(fields, state | {"threshold": torch.zeros(D_SAE)})
    with pytest.raises(ValueError, match="dtypes"):
        to_saelens(fields, state | {"b_enc": state["b_enc"].bfloat16()})
    with pytest.raises(ValueError, match="b_dec is torch.int64"):
        to_saelens(fields, state | {"b_dec": torch.zeros(D_IN, dtype=torch.int64)})
    with pytest.raises(ValueError, match="activation='tanh' has no SAELens form"):
        to_saelens(fields | {"activation": "tanh"}, state)
    with pytest.raises(ValueError, match="k=0 is not"):
        to_saelens(fields | {"k": 0}, state)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"k": 5}, "k"),
        ({"d_sae": 31}, "d_sae"),
        ({"activation": "relu"}, "activation"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input"),
    ],
)
def test_a_file_that_contradicts_our_block_is_refused(change, name):
    cfg, tensors = to_saelens(*random_sae("topk"))
    cfg["hf_gradtools"]["config"] |= change
    with pytest.raises(ValueError, match=f"cfg.json contradicts itself: {name}"):
        from_saelens(cfg, tensors)
    cfg["hf_gradtools"]["version"] = 2
    with pytest.raises(ValueError, match="block has version 2"):
        from_saelens(cfg, tensors)


def test_a_shared_threshold_that_is_not_one_is_refused():
    cfg, tensors = to_saelens(*random_sae("jumprelu", shared_threshold=True))
    tensors["threshold"][3] += 1
    with pytest.raises(ValueError, match="threshold holds values from .* says shared_threshold"):
        from_saelens(cfg, tensors)


def test_damaged_and_missing_files_are_named(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(FIXTURES / "saelens" / "topk", folder)
    weights = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ValueError, match=r"sae_weights.safetensors is not a whole safetensors file"):
        read_folder(folder)
    (folder / "cfg.json").write_text("[1")
    with pytest.raises(ValueError, match=r"cfg.json is not JSON"):
        read_folder(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"cfg.json holds a list"):
        read_folder(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no SAE; .* found expected.safetensors, sae_weights"):
        read_folder(folder)
    with pytest.raises(FileNotFoundError, match=r"found nothing"):
        read_folder(tmp_path / "absent")
