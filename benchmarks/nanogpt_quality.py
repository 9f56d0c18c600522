"""Validation loss of every variant after 1000 steps of the small model (E128 L4 T64 B12) on Shakespeare's characters.

```
python benchmarks/nanogpt_quality.py [--axes attention softmax] [--seeds 0 1 2] [--steps 1000] [--results runs.jsonl]
```

All models, the bare nanoGPT among them, go through the same loop (`bare_nanogpt.training_steps`) and, for one seed,
see the same batches in the same order. The loss is over the whole validation split, in rows that do not overlap. A row
differs from the preset in what it names and in nothing else.

Finished runs are kept in `--results`, one JSON line each, and are not run again: stop it and start it as you like, or
run several with different axes or seeds and the same file. The table holds all that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_nanogpt import BareConfig, BareNanoGPT, LoopOptions, training_steps
from common import environment, markdown_table
from nanogpt_models import SHAPES, our_fields
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.data import TokenFolder
from hf_gradtools.nanogpt.registry import VARIANTS


SHAPE = SHAPES["small"]
NO_POSITIONS = {"use_rotary_embeddings": False, "use_fire_embeddings": False, "use_abs_pos_embeddings": False}
BARE = {"nanoGPT (bare)": {"rotary": False}, "nanoGPT with rotary (bare)": {"rotary": True}}
Fields = dict[str, Any]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def named(kind: str, field: str, **more: Any) -> dict[str, Fields]:
    """One row for each registered name of a kind."""
    return {name: {field: name, **more} for name in VARIANTS[kind]}


def axes() -> dict[str, dict[str, Fields]]:
    """Axis -> row -> what it changes in the preset."""
    norm = {name: {"norm_variant_attn": name, "norm_variant_output": name} for name in VARIANTS["norm"]}
    return {
        "reference": {**BARE, "the same in NanoGPTForCausalLM": our_fields(SHAPE, "absolute"), "preset": {}},
        "attention": {
            **named("attention", "attention_variant"),
            "causal, ssm in turn": {"attention_variant": ["causal", "ssm"]},
            "causal, 2 key groups": {"n_kv_group": 2},
            "causal, window of 16": {"window_size": 16},
            "causal, QK norm": {"use_qk_norm": True},
            "causal, scores capped at 30": {"attn_logit_softcapping": 30.0},
            "causal, off by one learned per layer": {"use_flash_lobo": True},
            "causal, off by one learned per head": {"use_flash_lobo": True, "use_flash_lobo_per_head": True},
        },
        "softmax": named("softmax", "softmax_variant_attn"),
        "norm": norm,
        "placement": {
            "pre": {},
            "peri": {"use_peri_ln": True},
            "post": {"use_pre_ln": False, "use_post_ln": True},
            "parallel": {"use_parallel_mlp": True},
        },
        "position": {
            "none": NO_POSITIONS,
            "rotary": {**NO_POSITIONS, "use_rotary_embeddings": True},
            "FIRE": {**NO_POSITIONS, "use_fire_embeddings": True},
            "absolute": {**NO_POSITIONS, "use_abs_pos_embeddings": True},
            "rotary + absolute": {**NO_POSITIONS, "use_rotary_embeddings": True, "use_abs_pos_embeddings": True},
            "rotary + FIRE": {**NO_POSITIONS, "use_rotary_embeddings": True, "use_fire_embeddings": True},
        },
        "mlp": named("mlp", "mlp_variant"),
        "activation": {
            name: {"activation_variant": name} for name in ("gelu", "gelu_new", "relu", "silu", "squared_relu")
        },
        "linear": {name: {"linear_variant_attn": name, "linear_variant_mlp": name} for name in VARIANTS["linear"]},
    }


def build(row: str, fields: Fields, seed: int) -> tuple[nn.Module, Loss]:
    torch.manual_seed(seed)
    if row in BARE:
        return BareNanoGPT(BareConfig(**SHAPE.sizes() | {"vocab_size": vocab_size()}, **fields)), bare_loss
    config = NanoGPTConfig(**{**SHAPE.sizes(), **fields, "vocab_size": vocab_size()})
    return NanoGPTForCausalLM(config), our_loss


def bare_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x, y)[1]


def our_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(input_ids=x, shift_labels=y).loss


def vocab_size() -> int:
    return TokenFolder("shakespeare_char").vocab_size


@torch.no_grad()
def validation_loss(model: nn.Module, loss_of: Loss, tokens: np.ndarray, rows: int = 64) -> float:
    """Mean over all whole rows of the split."""
    length = SHAPE.block_size
    count = (len(tokens) - 1) // length
    ids = torch.from_numpy(np.asarray(tokens[: count * length + 1]).astype(np.int64))
    x, y = ids[:-1].view(count, length), ids[1:].view(count, length)
    model.eval()
    pairs = zip(x.split(rows), y.split(rows), strict=True)
    parts = [loss_of(model, a, b.contiguous()).item() * len(a) for a, b in pairs]
    return sum(parts) / count


def run(axis: str, row: str, fields: Fields, seed: int, steps: int) -> dict[str, Any]:
    data = TokenFolder("shakespeare_char")
    model, loss_of = build(row, fields, seed)
    torch.manual_seed(1000 + seed)  # of the batches, whatever the model drew for its weights
    start = time.process_time()
    losses = training_steps(model, data.tokens("train"), LoopOptions(), steps, loss_of, SHAPE.block_size)
    for _ in tqdm(losses, desc=f"{axis}: {row}, seed {seed}", total=steps, leave=False):
        pass
    seconds = time.process_time() - start
    return {
        **{"axis": axis, "row": row, "fields": fields, "seed": seed, "steps": steps},
        "val_loss": validation_loss(model, loss_of, data.tokens("val")),
        "params": sum(p.numel() for p in model.parameters()),
        "cpu_ms_per_step": 1e3 * seconds / steps,
    }


def finished(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


@cache
def _whole(row: str, fields: str) -> str:
    if row in BARE:
        return fields
    return NanoGPTConfig(**{**SHAPE.sizes(), **json.loads(fields)}).to_json_string(use_diff=False)


def key(record: dict[str, Any]) -> str:
    """Rows of several axes that are the same model are run once."""
    row = record["row"] if record["row"] in BARE else ""
    return json.dumps([row, _whole(row, json.dumps(record["fields"])), record["seed"], record["steps"]])


def table(records: list[dict[str, Any]], steps: int, chosen: list[str]) -> str:
    """Mean over the seeds, with the largest distance from it where there are several."""
    by_key: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["steps"] == steps:
            by_key.setdefault(key({**record, "seed": 0}), {})[record["seed"]] = record
    lines = []
    for axis, rows in axes().items():
        for row, fields in rows.items():
            runs = list(by_key.get(key({"row": row, "fields": fields, "seed": 0, "steps": steps}), {}).values())
            if runs and axis in chosen:
                losses = [one["val_loss"] for one in runs]
                mean = statistics.mean(losses)
                spread = f" ± {max(abs(loss - mean) for loss in losses):.3f}" if len(losses) > 1 else ""
                time_ms = statistics.median(one["cpu_ms_per_step"] for one in runs)
                lines.append([f"{axis}: {row}", f"{mean:.3f}{spread}", f"{runs[0]['params']:,}", f"{time_ms:.0f}"])
    return markdown_table(["variant", f"validation loss at {steps}", "parameters", "CPU ms a step"], lines)


def main() -> None:
    every = axes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(every), choices=every)
    parser.add_argument("--rows", nargs="+", help="only rows whose name has one of these parts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=Path("out/nanogpt_quality.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the table here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        {"axis": axis, "row": row, "fields": fields, "seed": seed, "steps": args.steps}
        for seed in args.seeds
        for axis in args.axes
        for row, fields in every[axis].items()
        if args.rows is None or any(part in row for part in args.rows)
    ]
    for one in tqdm(wanted, desc="runs"):
        if key(one) not in {key(record) for record in finished(args.results)}:
            record = run(**one)
            with args.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    text = f"{table(finished(args.results), args.steps, args.axes)}\n\n{environment()}"
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
