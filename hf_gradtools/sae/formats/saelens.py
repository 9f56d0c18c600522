"""SAELens' format (`cfg.json` and `sae_weights.safetensors`), which is ours too, with one block more in `cfg.json`.

Shape legend: D d_in · F d_sae.

SAELens keeps `W_enc` as `[D, F]`, we as `[F, D]`; all else lies alike. Its loader ignores the top-level key
`"hf_gradtools"`, where our full configuration goes; a file that SAELens wrote has none and is converted. What SAELens
computes and our forward pass does not is folded into the weights where that is exact, and refused by name elsewhere:

| in the file | becomes |
| --- | --- |
| `rescale_acts_by_decoder_norm: true` | encoder rows times, decoder rows over the decoder norm |
| `normalize_activations: "expected_average_only_in"` | `W_enc · s`, `W_dec / s`, `b_dec / s`, with s given |
| negative thresholds, which its ReLU hides | 0 |

Source: SAELens 6.54 (https://github.com/decoderesearch/SAELens).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_gradtools.sae.configuration_sae import ACTIVATIONS
from hf_gradtools.sae.formats.tensors import DTYPES, check_tensors, common_dtype, state_shapes


__all__ = ["from_saelens", "hook_name_of", "hookpoint_of", "to_saelens"]

Fields = dict[str, Any]
State = dict[str, Tensor]

BLOCK = "hf_gradtools"
BLOCK_VERSION = 1
THEIR_METADATA = "saelens"  # key of our own metadata where SAELens' (prepend_bos, context_size, ...) is kept
FORMAT_VERSION = "6.0.0"  # of SAELens: the first with this cfg.json; without it, its loader applies older rules

_ARCHITECTURE_OF = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "relu": "standard",
    "gated": "gated",
}
_ACTIVATION_OF = {
    "topk": "topk",
    "jumprelu": "jumprelu",
    "standard": "relu",
    "gated": "gated",
    # What SAELens' trainer checkpoints; it uses them as JumpReLU once trained, and so do we.
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}
_TRAINED_BY_BATCH = ("batchtopk", "matryoshka_batchtopk")
_OLD_KEYS = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_OLD_METADATA = ("model_name", "hook_name", "hook_head_index", "prepend_bos", "context_size", "dataset_path")
_EXACT = "Fold it into the weights with SAELens and save again, or pass another SAE."


def hook_name_of(hookpoint: str | None) -> str | None:
    """SAELens' name of a hookpoint: `"layers.5"` is `"blocks.5.hook_resid_post"`; other paths stay as they are."""
    block = re.fullmatch(r"layers\.(\d+)", hookpoint or "")
    return f"blocks.{block[1]}.hook_resid_post" if block else hookpoint


def hookpoint_of(hook_name: str | None) -> str | None:
    """The hookpoint of SAELens' name: the residual stream after block 5, which is that before block 6, is
    `"layers.5"`; other names stay as they are."""
    block = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name or "")
    if block is None:
        return hook_name
    layer = int(block[1]) - (block[2] == "pre")
    return f"layers.{layer}" if layer >= 0 else hook_name


# ---- ours -> SAELens


def to_saelens(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], State]:
    """Our SAE as SAELens' `cfg.json` and tensors.

    Args:
        config (`Mapping[str, Any]`): fields of an `SAEConfig`, all of them fit for JSON.
        state (`Mapping[str, Tensor]`): our tensors, of one dtype: `W_enc [F, D]`, `b_enc [F]`, `W_dec [F, D]`,
            `b_dec [D]`, with `threshold [F]` for jumprelu and batchtopk (`[1]` if shared), `r_mag [F]` and
            `b_mag [F]` for gated.

    Returns:
        `cfg.json`'s dict, and the tensors of `sae_weights.safetensors`. A batchtopk SAE is SAELens' jumprelu, as
        SAELens itself saves one.

    Raises:
        ValueError: for an unknown activation, tensors that do not fit, a k outside [1, d_sae], or a threshold below
            0, at which SAELens' ReLU would differ from ours.
    """
    activation, d_in, d_sae = config["activation"], config["d_in"], config["d_sae"]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} has no SAELens form; need one of {', '.join(ACTIVATIONS)}.")
    what = f"a {activation} SAE {d_in} -> {d_sae}"
    shared = bool(config.get("shared_threshold"))
    check_tensors(state, state_shapes(activation, d_in, d_sae, shared), what)
    dtype = common_dtype(state, what)
    cfg: dict[str, Any] = {
        "architecture": _ARCHITECTURE_OF[activation],
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.get("apply_b_dec_to_input", True),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            **(config.get("metadata") or {}).get(THEIR_METADATA, {}),
            "sae_lens_version": FORMAT_VERSION,
            "sae_lens_training_version": None,
            "model_name": config.get("model_name"),
            "hook_name": hook_name_of(config.get("hookpoint")),
        },
        BLOCK: {"version": BLOCK_VERSION, "config": dict(config)},
    }
    if activation == "topk":
        cfg |= {"k": _checked_k(config["k"], d_sae), "rescale_acts_by_decoder_norm": False}
    return cfg, _to_saelens_tensors(state, activation, d_sae)


def _to_saelens_tensors(state: Mapping[str, Tensor], activation: str, d_sae: int) -> State:
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    tensors["W_enc"] = tensors["W_enc"].mT.contiguous()
    if activation == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    threshold = tensors.get("threshold")
    if threshold is not None and not bool((threshold >= 0).all()):
        raise ValueError(
            f"threshold has entries below 0 (the smallest is {float(threshold.min()):g}) or not a number; SAELens' "
            "JumpReLU lets nothing below 0 pass. Clamp it first, with sae.threshold.data.clamp_(min=0)."
        )
    if threshold is not None:
        tensors["threshold"] = threshold.expand(d_sae).contiguous()
    return tensors


# ---- SAELens -> ours


def from_saelens(
    cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], *, scaling_factor: float | None = None
) -> tuple[Fields, State]:
    """An SAE in SAELens' format as ours; reads also what SAELens before 6.0 and its trainer's checkpoints hold.

    Args:
        cfg (`Mapping[str, Any]`): `cfg.json`.
        tensors (`Mapping[str, Tensor]`): `sae_weights.safetensors`.
        scaling_factor (`float`, *optional*): what inputs were multiplied by in training, needed where
            `normalize_activations` is `"expected_average_only_in"`; SAELens keeps it in `activation_scaler.json`.

    Returns:
        fields of an `SAEConfig`, and our tensors, in the dtype that `cfg` names. Weights in half precision into
        which something had to be folded come back in float32.

    Raises:
        ValueError: naming what our SAE cannot compute exactly, or the tensors that do not fit.
    """
    cfg = _modernised(cfg)
    architecture, d_in, d_sae = (_required(cfg, key) for key in ("architecture", "d_in", "d_sae"))
    if architecture not in _ACTIVATION_OF:
        raise ValueError(
            f"architecture={architecture!r} cannot be represented exactly; need one of {', '.join(_ACTIVATION_OF)}."
        )
    factor = _input_factor(cfg, scaling_factor)
    dtype = _dtype(cfg)
    state = _renamed(cfg, tensors, architecture)
    check_tensors(state, _saelens_shapes(architecture, d_in, d_sae), f"a SAELens {architecture} SAE {d_in} -> {d_sae}")
    state = {name: tensor.to(dtype) for name, tensor in state.items()}  # whatever the file holds, as SAELens does
    fields = _fields(cfg, architecture, d_in, d_sae)
    state = _to_our_tensors(_folded(state, cfg, factor), architecture, d_sae, bool(fields.get("shared_threshold")))
    return fields, {name: tensor.contiguous() for name, tensor in state.items()}


def _modernised(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`cfg` with the keys of SAELens 6, from whichever version."""
    new = {_OLD_KEYS.get(key, key): value for key, value in cfg.items()}
    if isinstance(new.get("metadata"), Mapping):
        return new
    activation = new.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise ValueError(
            f"activation_fn={activation!r} cannot be represented exactly; need 'relu' or 'topk'. {_EXACT}"
        )
    kwargs = new.get("activation_fn_kwargs") or {}
    if activation == "topk":
        new |= {"architecture": "topk", "k": kwargs.get("k")}
    hook_name = new.get("hook_name")
    scaled = new.get("normalize_activations")
    if isinstance(scaled, bool) or scaled is None:
        new["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    new.setdefault("architecture", "standard")
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in (hook_name or "") else "none")
    new["metadata"] = {key: new[key] for key in _OLD_METADATA if key in new}
    return new


def _input_factor(cfg: Mapping[str, Any], scaling_factor: float | None) -> float:
    """What the file's inputs are to be multiplied by; refuses every change of the input that no weights can hold."""
    for key in ("reshape_activations", "normalize_activations"):
        value = cfg.get(key, "none")
        if value != "none" and not (key == "normalize_activations" and value == "expected_average_only_in"):
            raise ValueError(f"{key}={value!r} cannot be represented exactly; need {key}='none'. {_EXACT}")
    if cfg.get("normalize_activations", "none") == "none":
        if scaling_factor is not None and scaling_factor != 1:
            raise ValueError(
                f"scaling_factor={scaling_factor} is given for an SAE with normalize_activations='none', whose inputs "
                "are not scaled. Leave it out."
            )
        return 1.0
    if scaling_factor is None or not scaling_factor > 0:
        raise ValueError(
            "normalize_activations='expected_average_only_in' scales the inputs by a factor that cfg.json does not "
            f"hold, and scaling_factor is {scaling_factor}. Pass scaling_factor=..., from SAELens' "
            "activation_scaler.json."
        )
    return float(scaling_factor)


def _renamed(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], architecture: str) -> State:
    """Without what older versions saved beside the weights."""
    state = dict(tensors)
    scale = state.get("scaling_factor")
    if scale is not None:
        if cfg.get("finetuning_scaling_factor") or not torch.allclose(scale, torch.ones_like(scale)):
            raise ValueError(f"Tensor 'scaling_factor' (finetuned latents) cannot be represented exactly. {_EXACT}")
        del state["scaling_factor"]
    if architecture == "jumprelu" and "log_threshold" in state:
        state["threshold"] = state.pop("log_threshold").exp()
    return state


def _saelens_shapes(architecture: str, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    shapes = state_shapes(_ACTIVATION_OF[architecture], d_in, d_sae)
    shapes["W_enc"] = (d_in, d_sae)
    if architecture == "gated":
        shapes["b_gate"] = shapes.pop("b_enc")
    if architecture in _TRAINED_BY_BATCH:
        del shapes["threshold"]
        shapes["topk_threshold"] = ()
    return shapes


def _folded(state: State, cfg: Mapping[str, Any], factor: float) -> State:
    """The weights with everything in them that our forward pass does not do, computed in float64."""
    rescaled = cfg.get("rescale_acts_by_decoder_norm", False)
    if not rescaled and factor == 1:
        return state
    kept = torch.float64 if state["W_enc"].dtype == torch.float64 else torch.float32
    state = {name: tensor.double() for name, tensor in state.items()}
    if rescaled:  # before the factor: a checkpoint's threshold is in units of the norms as they are
        norms = state["W_dec"].norm(dim=1).clamp(min=1e-8)
        state |= {
            "W_enc": state["W_enc"] * norms,
            "b_enc": state["b_enc"] * norms,
            "W_dec": state["W_dec"] / norms[:, None],
        }
    state |= {"W_enc": state["W_enc"] * factor, "W_dec": state["W_dec"] / factor, "b_dec": state["b_dec"] / factor}
    return {name: tensor.to(kept) for name, tensor in state.items()}


def _to_our_tensors(state: State, architecture: str, d_sae: int, shared_threshold: bool) -> State:
    state = dict(state)
    state["W_enc"] = state["W_enc"].mT
    if architecture == "gated":
        state["b_enc"] = state.pop("b_gate")
    if architecture in _TRAINED_BY_BATCH:
        state["threshold"] = state.pop("topk_threshold").expand(d_sae)
    if "threshold" in state:
        state["threshold"] = state["threshold"].clamp(min=0)
    if shared_threshold:
        threshold = state["threshold"]
        if not torch.equal(threshold, threshold[:1].expand_as(threshold)):
            raise ValueError(
                f"threshold holds values from {float(threshold.min()):g} to {float(threshold.max()):g}, but "
                f"cfg.json's {BLOCK!r} block says shared_threshold. "
                "Remove the block to load the file as one of SAELens."
            )
        state["threshold"] = threshold[:1]
    return state


def _fields(cfg: Mapping[str, Any], architecture: str, d_in: int, d_sae: int) -> Fields:
    fields: Fields = {
        "d_in": d_in,
        "d_sae": d_sae,
        "activation": _ACTIVATION_OF[architecture],
        "apply_b_dec_to_input": bool(cfg.get("apply_b_dec_to_input", True)),
    }
    if architecture == "topk":
        fields["k"] = _checked_k(_required(cfg, "k"), d_sae)
    if BLOCK in cfg:
        return _own_fields(cfg[BLOCK], fields)
    metadata = dict(cfg["metadata"])
    fields |= {
        "hookpoint": hookpoint_of(metadata.pop("hook_name", None)),
        "model_name": metadata.pop("model_name", None),
    }
    details = {**(metadata.get("training_architecture_details") or {}), **cfg}
    if details.get("matryoshka_widths"):
        fields["matryoshka_widths"] = list(details["matryoshka_widths"])
    kept = {key: value for key, value in metadata.items() if value is not None}
    return fields | ({"metadata": {THEIR_METADATA: kept}} if kept else {})


def _own_fields(block: Mapping[str, Any], fields: Fields) -> Fields:
    """The configuration that we saved, unless the rest of `cfg.json` says something else."""
    if block.get("version") != BLOCK_VERSION:
        raise ValueError(
            f"cfg.json's {BLOCK!r} block has version {block.get('version')!r}; this hf_gradtools reads "
            f"{BLOCK_VERSION}. Use the version of hf_gradtools that wrote it."
        )
    own = dict(block["config"])
    as_saved = {"apply_b_dec_to_input": True, **own, "activation": _ACTIVATION_OF[_ARCHITECTURE_OF[own["activation"]]]}
    for name, value in fields.items():
        if as_saved.get(name) != value:
            raise ValueError(
                f"cfg.json contradicts itself: {name} is {value!r}, but {own.get(name)!r} in its {BLOCK!r} block. "
                f"Remove the block to load the file as one of SAELens."
            )
    return own


def _checked_k(k: Any, d_sae: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
        raise ValueError(f"k={k!r} is not a number of latents; need an integer in [1, d_sae={d_sae}].")
    return k


def _dtype(cfg: Mapping[str, Any]) -> torch.dtype:
    name = str(_required(cfg, "dtype")).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} of cfg.json is not supported; need one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _required(cfg: Mapping[str, Any], key: str) -> Any:
    if cfg.get(key) is None:
        raise ValueError(f"cfg.json has no {key!r}; it does not describe an SAE of SAELens. It has {sorted(cfg)}.")
    return cfg[key]
