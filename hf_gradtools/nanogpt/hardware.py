"""What a configuration costs in hardware, before anything is trained: parameters, operations, state.

Counts are exact sums over the model's parts of what each says of itself (`Component.ops`); the conventions are those
of [`costs.Ops`]. Nothing is allocated: the model is made on the meta device.

In a prefill of T tokens, token t looks at min(t, window) keys: it equals the sum of decoding T tokens one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .configuration_nanogpt import NanoGPTConfig
from .costs import KINDS_OF_OPS, Ops
from .modeling_nanogpt import NanoGPTForCausalLM


@dataclass(frozen=True)
class HardwareReport:
    """The cost of a configuration at a context length.

    Args:
        context: T, tokens.
        params: parameters; tied ones once.
        state_bytes: bytes of keys, values and states after T tokens, of one sequence.
        decode: part -> operations for token T, which looks at the T - 1 before it and itself.
        prefill: part -> operations for all T tokens. Logits are of all tokens.
        bytes_per_number: size of a number in the state.
    """

    context: int
    params: int
    state_bytes: int
    decode: Mapping[str, Ops]
    prefill: Mapping[str, Ops]
    bytes_per_number: int

    @property
    def decode_total(self) -> Ops:
        """Operations for token T."""
        return sum(self.decode.values(), Ops())

    @property
    def prefill_total(self) -> Ops:
        """Operations for T tokens."""
        return sum(self.prefill.values(), Ops())

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates for token T."""
        return self.decode_total.mac

    @property
    def exps_per_token(self) -> int:
        """Exponentials for token T."""
        return self.decode_total.exp

    def as_dict(self) -> dict[str, Any]:
        """The report in plain containers."""
        return {
            "context": self.context,
            "params": self.params,
            "state_bytes": self.state_bytes,
            "macs_per_token": self.macs_per_token,
            **{
                phase: {part: asdict(ops) for part, ops in parts.items()} | {"total": asdict(total)}
                for phase, parts, total in (
                    ("decode", self.decode, self.decode_total),
                    ("prefill", self.prefill, self.prefill_total),
                )
            },
        }


def hardware_report(config: NanoGPTConfig, context: int | None = None, bytes_per_number: int = 2) -> HardwareReport:
    """Counts what a model of this configuration costs.

    Args:
        config (`NanoGPTConfig`): the configuration; nothing is trained or allocated.
        context (`int`, *optional*): T; default `block_size`.
        bytes_per_number (`int`, defaults to 2): of keys and values, 2 for bfloat16. The states of linear attention and
            ssm take at least 4.

    Raises:
        ValueError: `context` is below 1, or past absolute positions.
        ValueError: nobody counted the operations of an activation of transformers.
        NotImplementedError: a part of the user's own does not say what it costs.
    """
    context = config.block_size if context is None else context
    for name, value in (("context", context), ("bytes_per_number", bytes_per_number)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if config.use_abs_pos_embeddings and context > config.block_size:
        raise ValueError(f"context={context} is past block_size={config.block_size}, where absolute positions end.")
    with torch.device("meta"):
        model = NanoGPTForCausalLM(config)
    model.tie_weights()
    return HardwareReport(
        context=context,
        params=sum(p.numel() for p in model.parameters()),
        state_bytes=sum(block.attn.state_bytes(context, bytes_per_number) for block in model.transformer.h),
        decode=_ops_by_part(model, 1, lambda window: _visible(context, window)),
        prefill=_ops_by_part(model, context, lambda window: _visible_by_all(context, window)),
        bytes_per_number=bytes_per_number,
    )


def _visible(token: int, window: int | None) -> int:
    """Keys that token number `token` (from 1) looks at."""
    return token if window is None else min(token, window)


def _visible_by_all(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key, of all tokens."""
    full = tokens if window is None else min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * full


def _ops_by_part(model: NanoGPTForCausalLM, tokens: int, pairs_of: Any) -> dict[str, Ops]:
    body, config = model.transformer, model.config
    parts = {name: position.ops(tokens) for name, position in body.positions.items() if position.place == "embedding"}
    for i, block in enumerate(body.h):
        parts[f"h.{i}.attn"] = block.attn.ops(tokens, pairs_of(getattr(block.attn, "window", None)))
        parts[f"h.{i}.mlp"] = block.mlp.ops(tokens)
        parts[f"h.{i}.norm"] = sum((norm.ops(tokens) for norm in block.norms()), Ops())
        parts[f"h.{i}.residual"] = Ops(add=2 * tokens * config.n_embd)
    parts["ln_f"] = body.ln_f.ops(tokens)
    head = Ops(mac=config.n_embd * config.vocab_size)
    if config.final_logit_softcapping is not None:
        head += Ops(mul=2 * config.vocab_size, tanh=config.vocab_size)
    parts["lm_head"] = tokens * head
    return parts


def compare(reports: Mapping[str, HardwareReport]) -> list[dict[str, Any]]:
    """One row per figure, one column per report: parameters, state, and operations of each kind that any has."""
    rows: list[dict[str, Any]] = [
        {"figure": "parameters", **{name: report.params for name, report in reports.items()}},
        {"figure": "state bytes", **{name: report.state_bytes for name, report in reports.items()}},
    ]
    for phase in ("decode", "prefill"):
        totals = {name: getattr(report, f"{phase}_total") for name, report in reports.items()}
        for kind in KINDS_OF_OPS:
            counts = {name: getattr(total, kind) for name, total in totals.items()}
            if any(counts.values()):
                rows.append({"figure": f"{phase} {kind}", **counts})
    return rows
