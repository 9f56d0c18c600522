"""How the samples lie in a model call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.samples import SampleLayout


def infer_layout(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SampleLayout:
    """Rows, sequence lengths and packed segments of a model call.

    Rows are packed when `position_ids` start again inside a row and no attention mask says otherwise, as flattening
    (padding-free) collators make them.

    Raises:
        ValueError: no tensor among the arguments.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 0]
    if not tensors:
        raise ValueError("the model was called without a tensor, so the number of samples is unknown")
    first = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), tensors[0])
    named = [kwargs.get(k) for k in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels")]
    lengths = {x.shape[1] for x in [*named, first] if isinstance(x, Tensor) and x.ndim > 1}
    rows, segments, count = first.shape[0], None, 0
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2 and kwargs.get("attention_mask") is None:
        starts = positions == 0
        starts[:, 0] = True
        count = int(starts.sum())
        if count > rows and positions.shape[0] == rows:
            segments = (starts.flatten().cumsum(0) - 1).view(positions.shape)
    return SampleLayout(rows, tuple(sorted(lengths)), segments, count)
