"""Scoring a language model head that is never called: TRL's trainers multiply by its weight inside a fused loss.

Since TRL 1.15 `model(..., fused_lm_head=True)` returns per-token `log_probs` and no logits; `lm_head`'s own hooks stay
silent. The same function of hidden states and weight, written plainly, stands in for it when the log-probabilities'
gradients arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.calls import Layer
from ..core.capture import Observer, tap
from ..core.layers import Rule


_CHUNK_TOKENS = 512  # logits of so many tokens exist at a time


class FusedHead(nn.Module):
    """Log-probabilities of the labels under `softmax(h Wᵀ + b)`, zero where the label is −100.

    Shares the head's parameters.
    """

    def __init__(self, lm_head: nn.Linear):
        super().__init__()
        self.weight, self.bias = lm_head.weight, lm_head.bias

    def forward(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """`[rows, S, d]` and `[rows, S]` to `[rows, S]`."""
        mask = labels != -100
        hidden, wanted = hidden_states[mask], labels[mask]
        parts = []
        for h, y in zip(hidden.split(_CHUNK_TOKENS), wanted.split(_CHUNK_TOKENS), strict=True):
            logits = nn.functional.linear(h.to(self.weight.dtype), self.weight, self.bias)
            parts.append(logits.float().log_softmax(-1).gather(-1, y[:, None])[:, 0])
        values = torch.cat(parts) if parts else hidden.sum(-1).float()
        return values.new_zeros(labels.shape).masked_scatter(mask, values)


def fused_head_layer(model: nn.Module, layers: list[Layer]) -> Layer | None:
    """The layer that stands in for a scored output head, None when the head is not scored (or not a plain one)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    scored = {p: None for layer in layers for p in layer.parameters.values()}
    if type(head) is not nn.Linear or head.weight not in scored:
        return None
    fused = FusedHead(head)
    return Layer("lm_head (fused loss)", fused, dict(fused.named_parameters()), Rule(known=True))


class HookHandles:
    """Several hook handles that are removed together."""

    def __init__(self, handles: Sequence[RemovableHandle]):
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def install_fused_tap(model: nn.Module, layer: Layer, observer: Observer) -> HookHandles:
    """Taps the `log_probs` of the model's outputs.

    Args:
        model: a causal language model that TRL has given a fused head.
        layer: from :func:`fused_head_layer`.
        observer: told of the calls.
    """
    last: list[Tensor] = []
    verified: list[bool] = []

    def keep_hidden(module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)  # a model without a separate backbone has none
        last[:] = [] if hidden is None or observer.rows() is None else [hidden]

    def tap_log_probs(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        log_probs = getattr(output, "log_probs", None)
        if log_probs is None or observer.rows() is None or not last or not log_probs.requires_grad:
            return
        hidden = last.pop()
        labels = kwargs.get("shift_labels")
        if labels is None:
            hidden, labels = hidden[:, :-1], kwargs["labels"][:, 1:]
        if not verified:
            with torch.no_grad():
                expected = layer.module.forward(hidden, labels)
            verified.append(torch.allclose(expected, log_probs.float(), rtol=5e-2, atol=5e-2))
        if not verified[0]:
            raise ValueError(
                "the fused output head scales or caps its logits (temperature, logit_scale or softcapping), which "
                "per-sample values do not cover; leave the head out by layers=[...] or freeze it"
            )
        observer.seen(layer)
        output.log_probs = tap(observer, layer, (hidden, labels), {}, log_probs)

    return HookHandles(
        [
            model.base_model.register_forward_hook(keep_hidden),
            model.register_forward_hook(tap_log_probs, with_kwargs=True),
        ]
    )
