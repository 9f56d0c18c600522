"""EleutherAI's sparsify format (`cfg.json` and `sae.safetensors`), read only.

A sparsify coder keeps the k largest of `relu((x − b_dec) encoder.weightᵀ + encoder.bias)`, which is our topk under
other names.

Source: eai-sparsify 1.3 (https://github.com/EleutherAI/sparsify).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_gradtools.sae.formats.tensors import check_tensors, common_dtype


__all__ = ["block_name", "from_sparsify"]

_OUR_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
# What changes the result, and the only value with which ours is the same. `multi_topk` and `normalize_decoder` are
# about training.
_SAME_IF = {"activation": "topk", "skip_connection": False, "transcode": False, "signed": False}


def block_name(folder: str) -> str:
    """The hookpoint of a folder that sparsify named: `"h.5"`, a block of GPT-2, is `"layers.5"`."""
    return re.sub(r"^h\.(\d+)$", r"layers.\1", folder)


def from_sparsify(
    cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], *, hookpoint: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An SAE in sparsify's format as ours.

    Args:
        cfg (`Mapping[str, Any]`): `cfg.json`.
        tensors (`Mapping[str, Tensor]`): `sae.safetensors`.
        hookpoint (`str`, *optional*): name of the folder that the two lie in, which is the only place where sparsify
            keeps it; `"h.5"`, as it calls GPT-2's blocks, becomes `"layers.5"`.

    Returns:
        fields of an `SAEConfig`, and our tensors, in the dtype of the file.

    Raises:
        ValueError: naming what our SAE cannot compute exactly, or the tensors that do not fit.
    """
    for key, value in _SAME_IF.items():
        if cfg.get(key, value) != value:
            raise ValueError(
                f"{key}={cfg[key]!r} in sparsify's cfg.json cannot be represented exactly; need {key}={value!r}."
            )
    missing = [key for key in ("d_in", "k") if cfg.get(key) is None]
    if missing or not (cfg.get("num_latents") or cfg.get("expansion_factor")):
        raise ValueError(
            f"cfg.json does not describe a coder of sparsify: it has {sorted(cfg)}; "
            "need d_in, k, and num_latents or expansion_factor."
        )
    d_in, k = cfg["d_in"], cfg["k"]
    d_sae = cfg.get("num_latents") or d_in * cfg["expansion_factor"]
    if not 1 <= k <= d_sae:
        raise ValueError(f"k={k} in sparsify's cfg.json is not in [1, {d_sae}], the number of latents.")
    what = f"a sparsify coder {d_in} -> {d_sae}"
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    check_tensors(tensors, shapes, what)
    common_dtype(tensors, what)
    fields = {
        "d_in": d_in,
        "d_sae": d_sae,
        "activation": "topk",
        "k": k,
        "hookpoint": block_name(hookpoint) if hookpoint else None,
        "model_name": None,
    }
    return fields, {_OUR_NAMES[name]: tensor.contiguous() for name, tensor in tensors.items()}
