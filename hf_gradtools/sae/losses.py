"""The terms of an autoencoder's loss, as pure functions. N tokens, D = `d_in`, F = `d_sae`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_gradtools.sae.selection import top_k
from hf_gradtools.sae.sparse import SparseLatents, SparsePattern, decode, linear_at


__all__ = [
    "auxk_loss",
    "gate_loss",
    "l1_penalty",
    "mean_squared_error",
    "mean_variance",
    "prefix_reconstructions",
]


def mean_squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean over all entries of (x̂ − x)², summed up in float32 at least: half precision would round the loss itself."""
    return _MeanSquaredError.apply(reconstruction, x)


@torch.no_grad()
def mean_variance(x: Tensor) -> Tensor:
    """The variance of each dimension over tokens `[N, D]`, mean over dimensions; in float32 at least.

    Taken in two passes without a copy, so best of tokens that are centred roughly: what their mean has in common with
    zero is not lost in rounding.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean_square = torch.linalg.vector_norm(x, dtype=dtype).square() / x.numel()
    return mean_square - x.mean(0, dtype=dtype).square().mean()


def l1_penalty(latents: SparseLatents, W_dec: Tensor) -> Tensor:
    """The sum of a token's latents, each times the norm of what it writes; mean over tokens."""
    values = latents.values * W_dec.norm(dim=1).to(latents.values.dtype)[latents.indices]
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32)) / latents.pattern.num_tokens


def gate_loss(x: Tensor, gates: SparseLatents, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Mean squared error of reconstructing by the gates alone, which teaches gates but not the decoder.

    Source:
        [Gated Sparse Autoencoders](https://arxiv.org/abs/2404.16014), equation 8, last term.
    """
    return mean_squared_error(decode(gates.values, W_dec.detach(), gates.pattern) + b_dec.detach(), x)


def auxk_loss(residual: Tensor, x: Tensor, weights: Mapping[str, Tensor], dead: Tensor, k: int) -> Tensor:
    """Mean squared error of dead features' model of what the living ones leave over, so that they learn again.

    Of each token the k dead features with the largest pre-activations take part, as they are: without a ReLU also a
    feature that is negative on every token gets a gradient.

    Args:
        residual (`Tensor`): `[N, D]`, the error of the reconstruction; taken as given.
        x (`Tensor`): `[N, D]`, centred hidden states.
        weights (`Mapping[str, Tensor]`): `W_enc`, `b_enc`, `W_dec`.
        dead (`Tensor`): `[F]` bool, at least one of them true.
        k (`int`): features of each token, at most; fewer dead ones count for less.

    Source:
        [Scaling and evaluating sparse autoencoders](https://arxiv.org/abs/2406.04093), appendix A.2.
    """
    chosen = dead.nonzero().squeeze(1)
    W_enc, b_enc, W_dec = (weights[name][chosen] for name in ("W_enc", "b_enc", "W_dec"))
    taken = min(k, chosen.numel())
    with torch.no_grad():
        values, indices = _largest(torch.addmm(b_enc, x, W_enc.T), taken)
    pattern = SparsePattern.of_rows(indices, chosen.numel())
    values = linear_at(x, W_enc, b_enc, pattern, values.reshape(-1))
    return mean_squared_error(decode(values, W_dec, pattern), residual.detach()) * (taken / k)


def prefix_reconstructions(
    latents: SparseLatents, W_dec: Tensor, b_dec: Tensor, widths: Sequence[int]
) -> Iterator[Tensor]:
    """What the first features reconstruct alone, for each of rising widths, at the cost of one decode.

    Source:
        [Learning Multi-Level Features with Matryoshka Sparse Autoencoders](https://arxiv.org/abs/2503.17547).
    """
    reconstruction, start = b_dec, 0
    for width in widths:
        chosen = (latents.indices >= start) & (latents.indices < width)
        part = decode(latents.values[chosen], W_dec, latents.pattern.select(chosen))
        reconstruction, start = reconstruction + part, width
        yield reconstruction


def _largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row; also negative ones in their order, which [`top_k`] leaves open."""
    if k == pre.shape[1]:
        return pre, torch.arange(k, device=pre.device).expand(pre.shape)
    values, indices = top_k(pre, k)
    return (values, indices) if bool((values > 0).all()) else tuple(pre.topk(k, sorted=False))


class _MeanSquaredError(torch.autograd.Function):
    """Keeps the error, so that the backward pass neither takes it again nor casts its inputs again."""

    @staticmethod
    def forward(ctx: Any, reconstruction: Tensor, x: Tensor) -> Tensor:
        error = reconstruction - x
        ctx.save_for_backward(error)
        ctx.dtypes = reconstruction.dtype, x.dtype
        dtype = torch.promote_types(error.dtype, torch.float32)
        return torch.linalg.vector_norm(error, dtype=dtype).square() / error.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (error,) = ctx.saved_tensors
        gradient = error * (grad * (2 / error.numel())).to(error.dtype)
        needs_reconstruction, needs_x = ctx.needs_input_grad
        return (
            gradient.to(ctx.dtypes[0]) if needs_reconstruction else None,
            gradient.neg().to(ctx.dtypes[1]) if needs_x else None,
        )
