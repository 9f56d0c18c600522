"""Exact match on key-value retrieval: context in the prompt, and memories written in each mode, over K and N.

```
python benchmarks/gradmem_kv.py --quick                                # N=2 of an alphabet of 4, one seed: minutes
python benchmarks/gradmem_kv.py [--settings easy larger curriculum] [--kinds second first] [--seeds 0 1 2]
```

All cells of a setting share backbone, data, outer optimizer and steps, and differ in what they name. Finished
cells are kept in `--results`, one JSON line each as `results.json` of a run has it, and are not run again: stop it and
start it as you like, or run several with different cells and the same file. The tables hold all that are there;
`hf-gradtools gradmem plot --results` reads the file too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import environment
from tqdm.auto import tqdm

from hf_gradtools.gradmem.training import TrainOptions, train
from hf_gradtools.gradmem.training.plot import accuracy_table
from hf_gradtools.gradmem.training.results import label_of


# GRADMEM's recipe: what lets a two-layer Llama learn to write.
RECIPE: dict[str, Any] = {
    "base_model": "llama", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_mem_tokens": 4, "inner_lr": 4.0,
    "learn_inner_lr": True, "inner_lr_multiplier": 20.0, "use_write_head": True, "queries_per_context": 2,
    "adam_beta2": 0.99, "learning_rate": 2e-3, "warmup_steps": 50, "per_device_batch_size": 32, "eval_steps": 50,
    "logging_steps": 50, "eval_rows": 400, "eval_generation": False, "early_stopping_patience": None,
    "progress": False,
}  # fmt: skip
KINDS = ("second", "vanilla", "none", "first")


@dataclass(frozen=True)
class Setting:
    """A column of tables: a task, and how long it is learned.

    Attributes:
        tasks: names, each with its own number of pairs.
        steps: outer steps.
        Ks: steps of a write.
        changes: what differs from the recipe.
        levels: numbers of pairs of a curriculum; the figures of all its stages are kept.
    """

    tasks: tuple[str, ...]
    steps: int
    Ks: tuple[int, ...]
    changes: tuple[tuple[str, Any], ...] = ()
    levels: str | None = None


SETTINGS = {
    "easy": Setting(("N2-K1V1-V4",), 1500, (1, 2)),
    "pairs": Setting(("N2-K1V1-V8", "N4-K1V1-V8"), 1500, (1, 2), (("n_mem_tokens", 8),)),
    "larger": Setting(("N4-K1V1-V16", "N8-K1V1-V16"), 4000, (1, 2, 4), (("n_mem_tokens", 8),)),
    "curriculum": Setting(("N2-K1V1-V16",), 6000, (1, 2), (("n_mem_tokens", 8),), "2,4,8"),
}


def cells(settings: list[str], kinds: list[str], Ks: list[int] | None, seeds: list[int]) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        for name in settings:
            setting = SETTINGS[name]
            for task in setting.tasks:
                for kind in kinds:
                    for K in (1,) if kind == "vanilla" else setting.Ks:
                        if Ks is None or K in Ks or kind == "vanilla":
                            yield {"setting": name, "data_path": task, "kind": kind, "K": K, "seed": seed}


def run(cell: dict[str, Any], steps: int | None) -> dict[str, Any]:
    setting = SETTINGS[cell["setting"]]
    vanilla = cell["kind"] == "vanilla"
    options = {
        **RECIPE,
        **dict(setting.changes),
        "vanilla": vanilla,
        "grad_mode": "second" if vanilla else cell["kind"],
        "K": cell["K"],
        "data_path": cell["data_path"],
        "curriculum_levels": setting.levels,
        "max_steps": steps or setting.steps,
        "seed": cell["seed"],
    }
    with tempfile.TemporaryDirectory() as folder:
        return {"cell": {**cell, "steps": steps}, **train(TrainOptions(exp_path=folder, **options))}


def finished(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def tables(records: list[dict[str, Any]]) -> str:
    """Exact match of each setting's best evaluations, and beside it by generation, and of the last ones."""
    parts = []
    for name in SETTINGS:
        if rows := [record for record in records if record["cell"]["setting"] == name]:
            parts += [f"### {name}", accuracy_table(rows), details(rows)]
    return "\n\n".join(parts)


def details(records: list[dict[str, Any]]) -> str:
    lines = [
        "| run | seed | task | best | generated | at step | last | at step | wrong context | guess | seen | CPU s |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(records, key=lambda r: (r["num_pairs"], label_of(r), r["seed"])):
        seen = "" if r["seen_contexts"] is None else f"{r['seen_contexts']:.3f}"
        best = f"{r['metrics']['exact_match']:.3f} | {r['metrics']['generated_exact_match']:.3f} | {r['best_step']}"
        last = f"{r['stages'][-1]['exact_match']:.3f} | {r['steps']}"
        checks = f"{r['wrong_context_exact_match']:.3f} | {r['chance']:.3f} | {seen}"
        lines.append(
            f"| {label_of(r)} | {r['seed']} | {r['task']} | {best} | {last} | {checks} | {r['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the settings")
    parser.add_argument("--K", nargs="+", type=int, help="only these numbers of inner steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, help="outer steps instead of each setting's own")
    parser.add_argument("--quick", action="store_true", help="the easy setting with one seed")
    parser.add_argument("--results", type=Path, default=Path("out/gradmem_kv.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    settings, seeds = (["easy"], args.seeds[:1]) if args.quick else (args.settings, args.seeds)
    wanted = [
        cell
        for cell in cells(settings, args.kinds, args.K, seeds)
        if args.tasks is None or cell["data_path"] in args.tasks
    ]
    for cell in tqdm(wanted, desc="cells"):
        if {**cell, "steps": args.steps} not in [record["cell"] for record in finished(args.results)]:
            record = run(cell, args.steps)
            with args.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    text = f"{tables(finished(args.results))}\n\n{environment()}"
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
