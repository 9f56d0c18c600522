"""Per-sample gradient algebra of a matrix product: pure functions, tensors in, tensors out.

For `y = x Wᵀ` with inputs `a` and output gradients `g` the gradient of sample n is `W_n = g_nᵀ a_n`, the sum of the
outer products of its tokens. Each function below computes something of all `W_n` without keeping them.

Shape legend: N samples · S tokens of a sample · T tokens of any samples · I inputs · O outputs · K targets (matrices
to dot the per-sample gradients with).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


# One tile of a per-sample gradient; at this size it stays in cache between being formed, dotted and added (measured:
# smaller tiles starve the matrix kernel, whole matrices of a language model head spill to memory).
TILE_BYTES = 4 * 2**20
_SMALL_BYTES = 2**20

# Costs in multiply-adds of a full-speed matrix product, fitted to measurements on CPU and kept coarse on purpose: the
# ways differ by factors, not by per cents.
_TAKEOVER_COST_PER_ENTRY = 12.0
_TAKEOVER_COST_PER_SAMPLE = 1e6
_GRAM_COST_PER_PAIR = 8.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: half-precision products are never summed in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Dot products of the last axis, summed in :func:`accumulation_dtype`; `x` is scratch and may be overwritten."""
    dtype = accumulation_dtype(x.dtype)
    if x.dtype == dtype and y.dtype == dtype:
        return x.mul_(y).sum(-1)
    return (x.to(dtype) * y.to(dtype)).sum(-1)


def flat_dot(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ of two equally shaped tensors as a float64 scalar.

    BLAS adds up a million same-signed float32 terms to three digits or so; PyTorch's own sums are pairwise.
    """
    dtype = accumulation_dtype(x.dtype)
    x, y = x.detach().reshape(-1), y.detach().reshape(-1)
    chunk = TILE_BYTES // dtype.itemsize
    scratch = x.new_empty(min(chunk, x.numel()), dtype=dtype)
    parts = [
        torch.mul(a.to(dtype), b.to(dtype), out=scratch[: a.numel()]).sum()
        for a, b in zip(x.split(chunk), y.split(chunk), strict=True)
    ]
    return torch.stack(parts).double().sum()


def token_dots(activations: Tensor, output_grads: Tensor, targets: Tensor) -> Tensor:
    """⟨g_t a_tᵀ, G_k⟩ of every token, by contracting each target with the tokens ("contraction").

    Args:
        activations: `[..., I]`.
        output_grads: `[..., O]`, same leading axes.
        targets: `[K, O, I]`.

    Returns:
        `[K, ...]`. Costs T·O·I multiply-adds per target, as much as the batch's own weight gradient.
    """
    dtype = accumulation_dtype(output_grads.dtype)
    activations, output_grads = activations.to(output_grads.dtype).to(dtype), output_grads.to(dtype)
    targets = targets.to(dtype)
    # The temporary is as wide as the side that is not contracted: contract the wider one first.
    if activations.shape[-1] <= output_grads.shape[-1]:
        return torch.stack([_row_dots(output_grads @ target, activations) for target in targets])
    return torch.stack([_row_dots(activations @ target.mT, output_grads) for target in targets])


def gram_token_dots(activations: Tensor, output_grads: Tensor, other: tuple[Tensor, Tensor]) -> Tensor:
    """⟨g_t a_tᵀ, Σ_u g_u a_uᵀ⟩ of every token t with all tokens u of `other`, no weight gradient formed ("Gram").

    Args:
        activations: `[..., I]`.
        output_grads: `[..., O]`.
        other: activations `[U, I]` and output gradients `[U, O]` of the U tokens to dot with.

    Returns:
        `[...]`. Costs T·U·(I + O) multiply-adds.
    """
    dtype = accumulation_dtype(output_grads.dtype)
    other_activations, other_grads = (x.to(dtype) for x in other)
    similarity = activations.to(dtype) @ other_activations.mT
    return _row_dots(similarity, output_grads.to(dtype) @ other_grads.mT)


def sample_sq_norms(activations: Tensor, output_grads: Tensor) -> Tensor:
    """‖g_nᵀ a_n‖² of every sample, `[N]`, by whichever of Gram matrix and explicit gradient is cheaper.

    Args:
        activations: `[N, S, I]`.
        output_grads: `[N, S, O]`.
    """
    (_, tokens, inputs), outputs = activations.shape, output_grads.shape[-1]
    dtype = accumulation_dtype(output_grads.dtype)
    pairs = []
    for a, g in zip(activations.to(dtype), output_grads.to(dtype), strict=True):
        if tokens * (inputs + outputs) < inputs * outputs:
            pairs.append((a @ a.mT, g @ g.mT))
        else:
            weight_grad = g.mT @ a
            pairs.append((weight_grad, weight_grad))
    return torch.stack([flat_dot(x, y) for x, y in pairs]).to(dtype)


def takeover(
    activations: Tensor, output_grads: Tensor, targets: Tensor, with_sq_norms: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The batch's weight gradient, formed sample by sample, and on the way each sample's dots with the targets.

    The per-sample pieces are needed for the sum anyway, so beyond it this costs N·O·I·K multiply-adds on tiles that
    are still in cache.

    Args:
        activations: `[N, S, I]`.
        output_grads: `[N, S, O]`.
        targets: `[K, O, I]`.
        with_sq_norms: also return each sample's squared norm.

    Returns:
        weight gradient `[O, I]` (dtype of the accumulation), dots `[K, N]`, squared norms `[N]` or None.
    """
    samples, _, inputs = activations.shape
    outputs = output_grads.shape[-1]
    activations = activations.to(output_grads.dtype)
    dtype = accumulation_dtype(output_grads.dtype)
    if samples * inputs * outputs * dtype.itemsize <= _SMALL_BYTES:
        return _takeover_at_once(activations, output_grads, targets, with_sq_norms)
    weight_grad = activations.new_empty(outputs, inputs, dtype=dtype)
    dots = activations.new_zeros(len(targets), samples, dtype=dtype)
    sq_norms = activations.new_zeros(samples, dtype=dtype) if with_sq_norms else None
    rows = max(1, min(outputs, TILE_BYTES // (inputs * output_grads.element_size())))
    scratch = activations.new_empty(rows, inputs)
    products = activations.new_empty(len(targets), rows * inputs, dtype=dtype)
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        block, tile = weight_grad[start:stop], scratch[: stop - start]
        flat_targets = targets[:, start:stop].reshape(len(targets), -1).to(dtype)
        product = products[:, : tile.numel()]
        for n in range(samples):
            torch.mm(output_grads[n, :, start:stop].mT, activations[n], out=tile)
            piece = tile.view(-1).to(dtype)
            dots[:, n] += torch.mul(flat_targets, piece, out=product).sum(-1)  # as precise as :func:`flat_dot`
            if sq_norms is not None:
                sq_norms[n] += torch.mul(piece, piece, out=product[0]).sum()
            if n == 0:
                block.copy_(tile)
            else:
                block.add_(tile)
    return weight_grad, dots, sq_norms


def _takeover_at_once(
    activations: Tensor, output_grads: Tensor, targets: Tensor, with_sq_norms: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`takeover` of matrices so small (adapters) that all samples' gradients fit in cache together."""
    dtype = accumulation_dtype(output_grads.dtype)
    grads = torch.bmm(output_grads.mT, activations).to(dtype)
    flat = grads.flatten(1)
    dots = torch.stack([(flat * target.reshape(-1).to(dtype)).sum(-1) for target in targets])
    return grads.sum(0), dots, flat.square().sum(-1) if with_sq_norms else None


def cheapest_way(
    samples: int, tokens: int, inputs: int, outputs: int, targets: int = 1, gram_tokens: int | None = None
) -> str:
    """Which of "takeover", "contraction" and "gram" adds least to a training step for a layer call of these sizes.

    Args:
        samples: N.
        tokens: S, tokens per sample.
        inputs: I.
        outputs: O.
        targets: K.
        gram_tokens: number of validation tokens held for the Gram way, None where it cannot be used.
    """
    weight, all_tokens = inputs * outputs, samples * tokens
    costs = {
        "contraction": targets * all_tokens * weight,
        "takeover": samples * (weight * _TAKEOVER_COST_PER_ENTRY * (1 + targets) / 2 + _TAKEOVER_COST_PER_SAMPLE),
        "gram": math.inf
        if gram_tokens is None
        else all_tokens * gram_tokens * (inputs + outputs + _GRAM_COST_PER_PAIR * targets),
    }
    return min(costs, key=costs.__getitem__)
