"""Which features are active: the largest of each token, the largest of a batch, or all above a threshold.

Nothing here has gradients: [`hf_gradtools.sae.sparse`] adds them for what was selected.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_gradtools.sae.sparse import SparsePattern


__all__ = ["above", "largest_in_batch", "linear_top_k", "pre_activations", "top_k"]

# The dense pre-activations of this many bytes are held at a time; they stay in a CPU's cache until they were searched.
CHUNK_BYTES = 16 * 2**20
GROUPS = (16, 8, 4, 2)
ORDERED_AS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@torch.no_grad()
def linear_top_k(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `relu(x @ weight.T + bias)` of each token, without holding all of them.

    Args:
        x (`Tensor`): `[N, D]`.
        weight (`Tensor`): `[F, D]`.
        bias (`Tensor`): `[F]`.
        k (`int`): features of each token.

    Returns:
        `tuple[Tensor, Tensor]`: values `[N, k]`, not negative, and features `[N, k]`; in no order.
    """
    values, indices = x.new_empty(x.shape[0], k), torch.empty(x.shape[0], k, dtype=torch.long, device=x.device)
    for rows, pre in _chunks(x, weight, bias):
        values[rows], indices[rows] = top_k(pre, k)
    return values.relu_(), indices


@torch.no_grad()
def pre_activations(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`: `[N, F]`."""
    return torch.addmm(bias, x, weight.T)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, exact wherever they are positive; other places are filled with any others.

    Columns are grouped, and only the k groups with the largest maxima are searched: an entry outside of them has k
    entries before it that are no smaller. Floats are compared as the integers of their bits, which order positive ones
    as themselves and put negative ones below; NaN is the largest, unless its sign is set.

    Args:
        pre (`Tensor`): `[N, F]`.
        k (`int`): at most F.

    Returns:
        `tuple[Tensor, Tensor]`: values and columns, `[N, k]`, in no order.
    """
    num_rows, width = pre.shape
    group = next((size for size in GROUPS if width % size == 0 and k * size * 4 <= width), 1)
    keys = pre.view(ORDERED_AS[pre.dtype]) if pre.dtype in ORDERED_AS else pre
    if group == 1:
        indices = keys.topk(k, sorted=False).indices
        return pre.gather(1, indices), indices
    grouped = keys.reshape(num_rows, group, width // group)  # a group is a column here, so that maxima are vectorised
    best = grouped.amax(1).topk(k, sorted=False).indices
    candidates = grouped.gather(2, best[:, None].expand(-1, group, -1)).view(num_rows, group * k)
    found = candidates.topk(k, sorted=False).indices
    indices = best.gather(1, found % k) + found.div(k, rounding_mode="floor") * (width // group)
    return pre.gather(1, indices), indices


@torch.no_grad()
def above(pre: Tensor, bound: Tensor | float) -> SparsePattern:
    """The entries of `[N, F]` above a bound, and NaN, so that it shows in the latents instead of looking like none."""
    return SparsePattern.of_mask((pre <= bound).logical_not_())


@torch.no_grad()
def largest_in_batch(pre: Tensor, k: int) -> SparsePattern:
    """The k·N largest positive entries of a batch, wherever they are (BatchTopK).

    Args:
        pre (`Tensor`): `[N, F]`.
        k (`int`): features of a token in the mean.

    Source:
        [BatchTopK Sparse Autoencoders](https://arxiv.org/abs/2412.06410), equation 3.
    """
    wanted = k * pre.shape[0]
    positive = pre > 0
    flat = pre.reshape(-1)
    if int(positive.sum()) <= wanted:
        return SparsePattern.of_mask(positive)
    bound = _lower_bound(flat, wanted)
    places = (flat > bound).nonzero().squeeze(1)
    chosen = places[flat[places].topk(wanted, sorted=False).indices].sort().values
    offsets = torch.searchsorted(chosen, torch.arange(pre.shape[0] + 1, device=pre.device) * pre.shape[1])
    return SparsePattern(chosen % pre.shape[1], offsets, pre.shape[1])


def _lower_bound(flat: Tensor, wanted: int) -> float:
    """A number that more than `wanted` entries exceed, if it can be one that is not far below the largest of them."""
    sample = flat[:: max(1, flat.numel() // 100_000)]
    for slack in (1.2, 2.0, 4.0):
        rank = min(sample.numel(), int(slack * wanted / flat.numel() * sample.numel()) + 2)
        bound = float(sample.topk(rank).values[-1])
        if bound > 0 and int((flat > bound).sum()) >= wanted:
            return bound
    return 0.0


def _chunks(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations of some tokens at a time, in a buffer that is used again."""
    size = (
        max(1, min(x.shape[0], CHUNK_BYTES // (weight.shape[0] * x.element_size())))
        if x.device.type == "cpu"
        else x.shape[0]
    )
    buffer = x.new_empty(size, weight.shape[0])
    for start in range(0, x.shape[0], size):
        part = x[start : start + size]
        yield slice(start, start + size), torch.addmm(bias, part, weight.T, out=buffer[: part.shape[0]])
