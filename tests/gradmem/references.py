"""GradMem by its definition: one sample at a time, without padding, with the plainest attention and `create_graph`.

It knows nothing of the package. A backbone built by transformers, the values of all parameters by name, and the fields
of the configuration go in; losses and memories come out, with autograd's graph behind them, in the precision of the
values. Letters: M rows of memory, S tokens of a context, Q of a query, d width of the model, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm


State = dict[str, Tensor]  # "mem" [M, d], and "weight" [d, d], "bias" [d] where a sample has its own projection
PLAIN = "gradmem_reference"


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None, **__: Any
) -> tuple[Tensor, None]:
    """Causal attention of [1, heads, S, width] over itself. transformers' own casts the weights to float32."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(PLAIN, plain_attention)


@contextmanager
def exact_norms() -> Iterator[None]:
    """Llama's norm in the precision of its input; transformers' own goes through float32."""

    def forward(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    with mock.patch.object(LlamaRMSNorm, "forward", forward):
        yield


@dataclass
class Written:
    """What a write leaves: the state after it, and of each step the loss and the raw gradients before it."""

    state: State
    losses: list[Tensor] = field(default_factory=list)
    grads: list[State] = field(default_factory=list)


@dataclass
class Query:
    """One row to be read: its real tokens, and their labels, -100 where none is asked for."""

    ids: Tensor
    labels: Tensor


class Reference:
    """
    Args:
        backbone: a causal LM of transformers with the attention `PLAIN`; only its code is used.
        weights: its parameters by their names.
        values: the other parameters by their names in the model.
        config: the fields of `GradMemConfig`.
        write_deltas: what is added to some of the weights during a write.
    """

    def __init__(
        self, backbone: nn.Module, weights: State, values: State, config: Any, write_deltas: State | None = None
    ):
        self.backbone, self.values, self.config = backbone, values, config
        deltas = write_deltas or {}
        self.read_weights = weights
        self.write_weights = {name: w + deltas[name] if name in deltas else w for name, w in weights.items()}
        table = backbone.get_input_embeddings().weight
        self.table = next(name for name, parameter in backbone.named_parameters() if parameter is table)

    # ---- sequences

    def start(self) -> State:
        state = {"mem": self.values["mem"]}
        if self.config.mem_proj_mode == "per_sample":
            state |= {name: self.values[f"mem_proj.{name}"] for name in ("weight", "bias")}
        return state

    def shown(self, state: State) -> Tensor:
        """The memory as the backbone sees it."""
        if self.config.mem_proj_mode == "none":
            return state["mem"]
        own = state if "weight" in state else {n: self.values[f"mem_proj.{n}"] for n in ("weight", "bias")}
        return state["mem"] @ own["weight"].T + own["bias"]

    def logits(self, state: State, ids: Tensor, phase: str) -> Tensor:
        """[1 + len(ids), V]: after the last token before `ids`, and after each of `ids`."""
        weights = self.write_weights if phase == "write" else self.read_weights
        control = [self.values[f"{phase}_{side}"] for side in ("st", "end") if self.config.n_ctrl_tokens]
        before = [*control[:1], self.shown(state), *control[1:]]
        embeddings = torch.cat([*before, weights[self.table][ids]])
        inputs = {"inputs_embeds": embeddings[None], "use_cache": False, "output_hidden_states": True}
        out = functional_call(self.backbone, weights, kwargs=inputs)
        first = sum(map(len, before)) - 1
        if phase == "write" and self.config.use_write_head:
            return out.hidden_states[-1][0, first:] @ self.values["write_head.weight"].T
        return out.logits[0, first:]

    def inner_loss(self, state: State, context: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(state, context, "write")[:-1], context)

    def read(self, state: State, ids: Tensor) -> Tensor:
        """Logits [Q, V] at the query's tokens."""
        return self.logits(state, ids, "read")[1:]

    def greedy(self, state: State, ids: Tensor, count: int) -> Tensor:
        """`count` tokens, each the likeliest after all before it, read anew from the start for every one."""
        for _ in range(count):
            ids = torch.cat([ids, self.read(state, ids)[-1].argmax()[None]])
        return ids[-count:]

    # ---- write

    def is_differentiated(self, step: int, steps: int) -> bool:
        if self.config.grad_mode != "second":
            return False
        last = self.config.last_k_second_order
        return last is None or step >= steps - last

    def clipped(self, grad: Tensor) -> Tensor:
        value, norm = self.config.inner_clip_value, self.config.inner_clip_norm
        if value is not None:
            grad = grad.clamp(-value, value)
        if norm is not None:
            grad = grad * torch.clamp(norm / (grad.square().sum().sqrt() + 1e-6), max=1)
        return grad

    def write(self, context: Tensor, state: State | None = None, steps: int | None = None) -> Written:
        steps = self.config.K if steps is None else steps
        done = Written(self.start() if state is None else state)
        if self.config.grad_mode == "none":
            done.state = {name: value.detach() for name, value in done.state.items()}
        rate = self.values.get("inner_lr", self.config.inner_lr)
        moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in done.state.items()}
        for step in range(steps):
            point = {n: v if v.requires_grad else v.detach().requires_grad_() for n, v in done.state.items()}
            loss = self.inner_loss(point, context)
            exact = self.is_differentiated(step, steps)
            grads = torch.autograd.grad(loss, list(point.values()), create_graph=exact, retain_graph=True)
            done.losses.append(loss)
            done.grads.append(dict(zip(point, grads, strict=True)))
            for name, grad in done.grads[-1].items():
                move = self.clipped(grad)
                if self.config.use_adam:
                    move, moments[name] = adam(move, *moments[name], step + 1)
                done.state = {**done.state, name: done.state[name] - rate * move}
        if self.config.grad_mode == "none":
            done.state = {name: value.detach() for name, value in done.state.items()}
        return done

    # ---- the whole

    def loss(
        self,
        contexts: Sequence[Tensor],
        queries: Sequence[Sequence[Query]],
        items: int | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """What training minimises: the mean over all labelled tokens, or their sum over `items`."""
        written = [self.write(context, steps=steps) for context in contexts]
        sums, counts = [], 0
        for done, rows in zip(written, queries, strict=True):
            for row in rows:
                logits, labels = self.read(done.state, row.ids)[:-1], row.labels[1:]
                sums.append(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
                counts += int((labels != -100).sum())
        loss = torch.stack(sums).sum() / (counts if items is None else items)
        if self.config.add_inner_loss_to_outer:
            last = torch.stack([done.losses[-1] for done in written])
            loss = loss + self.config.inner_loss_weight * last.mean()
        return loss


def adam(grad: Tensor, mean: Tensor, square: Tensor, step: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad.square()
    move = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return move, (mean, square)
