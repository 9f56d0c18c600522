"""Attention that can be differentiated twice without keeping its weights.

Fused kernels have no second derivative, and written openly attention keeps several `[N, H, S, T]` tensors for it. Here
only queries, keys, values and the output's gradient are kept; weights are computed again, a block of heads at a time.

Legend: N rows, H heads, S queries, T keys, D head size.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


TWICE_DIFFERENTIABLE = "gradmem_twice_differentiable"  # as transformers' registry of attentions knows it
BLOCK_NUMBERS = 2**18  # attention weights computed at once: they should stay in a processor's cache


def twice_differentiable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(Q Kᵀ · scaling + mask) V with a first and a second derivative.

    Args:
        query: `[N, H, S, D]`.
        key, value: `[N, H, T, D]`.
        mask: `[N or 1, H or 1, S, T]`, True where a query may look, or what is added to the scores.
        scaling: of the scores, default D^(-1/2).
        is_causal: whether query s sees keys 0…s only; not together with a mask.
        dropout: share of the weights that are dropped. With it, or a mask that is learned, weights are kept after all.

    Returns:
        `[N, H, S, D]`. The gradient costs as much as open attention's, the second derivative twelve products of
        `[S, T]` by D; neither keeps a tensor of that size.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_causal:
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    is_constant = mask is None or not mask.requires_grad
    if dropout == 0 and is_constant:
        return _Attention.apply(query, key, value, mask, scaling)
    scores = query @ key.mT * scaling
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return nn.functional.dropout(weights, dropout) @ value


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling = scaling
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        return *_AttentionGrad.apply(query, key, value, output_grad, mask, ctx.scaling), None, None


class _AttentionGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, output_grad: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(query, key, value, output_grad, mask)
        ctx.scaling = scaling
        blocks = _by_blocks(functools.partial(attention_vjp, scaling=scaling), mask, query, key, value, output_grad)
        return blocks[0], blocks[1], blocks[2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_query: Tensor, for_key: Tensor, for_value: Tensor) -> tuple[Tensor | None, ...]:
        *saved, mask = ctx.saved_tensors
        second = functools.partial(attention_vjp_vjp, scaling=ctx.scaling)
        return *_by_blocks(second, mask, *saved, for_query, for_key, for_value), None, None


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    scores = torch.bmm(query, key.mT).mul_(scaling)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)


def attention_vjp(
    query: Tensor, key: Tensor, value: Tensor, output_grad: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention for its queries, keys and values, all `[heads, S or T, D]`.

    With P the weights and G the output's gradient: dV = Pᵀ G, dS = P ∘ (G Vᵀ − rowsum(P ∘ G Vᵀ)), dQ = c dS K and
    dK = c dSᵀ Q.
    """
    weights = _weights(query, key, mask, scaling)
    weight_grad = torch.bmm(output_grad, value.mT)
    score_grad = _softmax_vjp(weights, weight_grad).mul_(scaling)
    return torch.bmm(score_grad, key), torch.bmm(score_grad.mT, query), torch.bmm(weights.mT, output_grad)


def attention_vjp_vjp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output_grad: Tensor,
    for_query: Tensor,
    for_key: Tensor,
    for_value: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of φ = ⟨dQ, A⟩ + ⟨dK, B⟩ + ⟨dV, C⟩ for Q, K, V and G, where dQ, dK, dV are [`attention_vjp`]'s.

    With W = c (A Kᵀ + Q Bᵀ), φ = ⟨dS, W⟩ + ⟨P, G Cᵀ⟩. Differentiating dS = P ∘ (dP − D), D = rowsum(P ∘ dP), gives
    X = P ∘ (W − rowsum(P ∘ W)) for dP = G Vᵀ, and Y = dP ∘ (W − rowsum(P ∘ W)) − D ∘ W + G Cᵀ for P itself.

    Args:
        for_query, for_key, for_value: A, B, C, of the shapes of Q, K, V.
    """
    weights = _weights(query, key, mask, scaling)
    weight_grad = torch.bmm(output_grad, value.mT)
    along = torch.bmm(torch.cat([for_query, query], -1), torch.cat([key, for_key], -1).mT).mul_(scaling)  # W
    mean_grad = (weights * weight_grad).sum(-1, keepdim=True)  # D
    centred = along - (weights * along).sum(-1, keepdim=True)
    for_weights = torch.baddbmm(weight_grad * centred, output_grad, for_value.mT).sub_(mean_grad * along)  # Y
    for_weight_grad = centred.mul_(weights)  # X
    for_scores = _softmax_vjp(weights, for_weights).mul_(scaling)
    score_grad = (weight_grad - mean_grad).mul_(weights).mul_(scaling)
    query_grad = torch.baddbmm(torch.bmm(for_scores, key), score_grad, for_key)
    key_grad = torch.baddbmm(torch.bmm(for_scores.mT, query), score_grad.mT, for_query)
    value_grad = torch.bmm(for_weight_grad.mT, output_grad)
    output_grad_grad = torch.baddbmm(torch.bmm(for_weight_grad, value), weights, for_value)
    return query_grad, key_grad, value_grad, output_grad_grad


def _softmax_vjp(weights: Tensor, weight_grad: Tensor) -> Tensor:
    return (weight_grad - (weights * weight_grad).sum(-1, keepdim=True)).mul_(weights)


def _by_blocks(function: Any, mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """`function(*tensors, mask)` by blocks of heads; tensors `[N, H, S or T, D]`, results as the first of them."""
    rows, heads, queries, _ = tensors[0].shape
    keys = tensors[1].shape[2]
    flat = [tensor.reshape(rows * heads, *tensor.shape[2:]) for tensor in tensors]
    block = max(1, BLOCK_NUMBERS // (queries * keys))
    shared = mask is None or mask.shape[:2].numel() == 1
    if mask is not None:
        mask = mask.reshape(1, queries, keys) if shared else mask.expand(rows, heads, queries, keys).flatten(0, 1)
    results: list[Tensor] = []
    for start in range(0, rows * heads, block):
        part = slice(start, start + block)
        outputs = function(*(tensor[part] for tensor in flat), mask=mask if shared else mask[part])
        if block >= rows * heads:
            results = list(outputs)
            break
        if not results:
            results = [torch.empty_like(tensor) for tensor, _ in zip(flat, outputs, strict=False)]
        for result, output in zip(results, outputs, strict=True):
            result[part] = output
    return [result.reshape(tensor.shape) for result, tensor in zip(results, tensors, strict=False)]


def _attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' models call: heads on dimension 1 in, on dimension 2 out."""
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extras:
        raise ValueError(
            f"{type(module).__name__} uses {', '.join(extras)}, which GradMem's attention for second derivatives has "
            'not. Load the model with attn_implementation="eager".'
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = causal and attention_mask is None and query.shape[2] > 1
    output = twice_differentiable_attention(query, key, value, attention_mask, scaling, causal, dropout)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(TWICE_DIFFERENTIABLE, _attention_interface)
AttentionMaskInterface.register(TWICE_DIFFERENTIABLE, sdpa_mask)
