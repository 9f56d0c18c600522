"""Strict checks of an SAE's tensors, shared by the formats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


Shapes = Mapping[str, tuple[int, ...]]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def state_shapes(activation: str, d_in: int, d_sae: int, shared_threshold: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of our own SAE with this activation."""
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_sae, d_in),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if activation in ("jumprelu", "batchtopk"):
        shapes["threshold"] = (1,) if shared_threshold and activation == "jumprelu" else (d_sae,)
    elif activation == "gated":
        shapes |= {"r_mag": (d_sae,), "b_mag": (d_sae,)}
    return shapes


def check_tensors(tensors: Mapping[str, Tensor], shapes: Shapes, what: str) -> None:
    """Refuses missing, extra, misshapen and non-floating tensors by name.

    Args:
        tensors (`Mapping[str, Tensor]`): what was found.
        shapes (`Mapping[str, tuple[int, ...]]`): what is needed, no more and no less.
        what (`str`): whose tensors these are, for the error.

    Raises:
        ValueError: naming every tensor that is wrong.
    """
    wrong = [f"{name} {shape} is missing" for name, shape in shapes.items() if name not in tensors]
    for name, tensor in tensors.items():
        found = tuple(tensor.shape)
        if name not in shapes:
            wrong.append(f"{name} {found} is not expected")
        elif found != shapes[name]:
            wrong.append(f"{name} is {found} instead of {shapes[name]}")
        elif not tensor.is_floating_point():
            wrong.append(f"{name} is {tensor.dtype}, not a floating-point tensor")
    if wrong:
        needed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"Tensors of {what} do not fit: {'; '.join(wrong)}. Need exactly {needed}.")


def common_dtype(tensors: Mapping[str, Tensor], what: str) -> torch.dtype:
    """The one dtype of all tensors.

    Raises:
        ValueError: if they have several, or one that the formats do not know.
    """
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) != 1 or not set(dtypes.values()) <= set(DTYPES.values()):
        raise ValueError(
            f"Tensors of {what} have dtypes {dtypes}; need one of {sorted(DTYPES)} for all of them. "
            "Cast the SAE first, with sae.to(torch.float32)."
        )
    return next(iter(dtypes.values()))
