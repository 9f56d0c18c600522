"""Training speed of one SAE, and what it has learnt after equal tokens, beside SAELens, sparsify, dictionary_learning.

```
python benchmarks/sae_throughput.py --saelens-python ENV/bin/python --sparsify-python ENV/bin/python
    --dictionary-learning-python ENV/bin/python [--batches 256 4096] [--dtypes float32 bfloat16] [--rounds 3]
    [--only speed] [--fvu-activations real.safetensors] [--output table.md]
```

The rivals' pins clash, so each may have an interpreter of its own; without one it is looked for in this one, and left
out with a word if it is not there. Every library makes the SAE its own way (768 -> 4096, k = 32) and takes its own
trainer's step, in a process of its own, on the same file of activations. Rounds run all of them in turn, each round
starting one further on; what counts is the median over the rounds of the ratio to SAELens in the same round. The floor
is the encoder's product of each batch, nothing else.

FVU is measured on held-out rows after `--fvu-tokens` tokens, at each library's defaults and at the best of
`--learning-rates` (Adam, warm-up over 5 % of the run). It needs activations worth learning from: a safetensors file
with `train [N, D]` and `heldout [M, D]`; without one it is random directions by a power law, on which the order of the
libraries says little.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import environment, markdown_table
from sae_rivals.activations import write_structured
from sae_rivals.worker import Job


HERE = Path(__file__).parent
BASELINE, FLOOR = "SAELens topk", "GEMM floor"
D_IN, HELDOUT = 768, 8192
Result = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One worker in one setting; `library` is what its interpreter must have."""

    worker: str
    library: str
    activation: str = "topk"
    in_fvu: bool = True


VARIANTS = {
    "**ours** topk": Variant("ours", "hf_gradtools"),
    BASELINE: Variant("saelens", "sae_lens"),
    "SAELens jumprelu": Variant("saelens", "sae_lens", "jumprelu", in_fvu=False),
    "sparsify topk": Variant("sparsify", "sparsify"),
    "dictionary_learning topk": Variant("dictionary_learning", "dictionary_learning"),
    FLOOR: Variant("gemm", "torch", in_fvu=False),
}


class Runner:
    """Runs workers in their interpreters; one that fails is named and left out from then on."""

    def __init__(self, pythons: dict[str, str | None]):
        self.pythons, self.versions = pythons, set()
        self.left_out = {}
        for name, variant in VARIANTS.items():
            if self._python(variant) is None:
                self._leave_out(name, f"{variant.library} is not installed here, and no interpreter with it was named")

    def _python(self, variant: Variant) -> str | None:
        given = self.pythons.get(variant.library)
        return given or (sys.executable if importlib.util.find_spec(variant.library) else None)

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        print(f"left out: {name} ({reason})", file=sys.stderr)

    def names(self) -> list[str]:
        return [name for name in VARIANTS if name not in self.left_out]

    def run(self, name: str, job: Job) -> Result | None:
        variant = VARIANTS[name]
        flags = replace(job, activation=variant.activation).as_flags()
        command = [self._python(variant), "-m", f"sae_rivals.{variant.worker}", *flags]
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.run(
            command, cwd=HERE, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no output"]
            errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
            self._leave_out(name, (errors or lines)[-1])
            return None
        result = json.loads(process.stdout.strip().splitlines()[-1])
        self.versions.add(result["version"])
        told = f"{result['tokens_per_second']:,.0f} tokens/s" + (f", FVU {result['fvu']:.4f}" if job.fvu else "")
        rate = "" if job.learning_rate is None else f", learning rate {job.learning_rate:g}"
        print(f"{name}, batch {job.batch}, {job.dtype}{rate}: {told}", file=sys.stderr, flush=True)
        return result


def measure_speed(runner: Runner, job: Job, rounds: int) -> str:
    """The table of one batch size and precision."""
    results: dict[str, list[Result]] = {name: [] for name in runner.names()}
    names = list(results)
    for start in range(rounds):
        turn = start % len(names)
        for name in names[turn:] + names[:turn]:
            if name not in runner.left_out and (result := runner.run(name, job)):
                results[name].append(result)
    done = {name: found for name, found in results.items() if len(found) == rounds}
    rows = []
    for name, found in done.items():
        row = [name]
        for clock in ("tokens_per_second", "tokens_per_cpu_second"):
            row += [f"{statistics.median(result[clock] for result in found):,.0f}"]
            row += [_ratio(found, done.get(other), clock) for other in (BASELINE, FLOOR)]
        rows.append(row)
    columns = ["× SAELens", "of the floor"]
    header = [f"batch {job.batch}, {job.dtype}", "tokens/s", *columns, "tokens/CPU-s", *columns]
    return markdown_table(header, rows)


def _ratio(mine: list[Result], theirs: list[Result] | None, clock: str) -> str:
    if theirs is None:
        return "-"
    return f"{statistics.median(a[clock] / b[clock] for a, b in zip(mine, theirs, strict=True)):.2f}"


def measure_fvu(runner: Runner, job: Job, learning_rates: list[float]) -> str:
    """Held-out FVU by default settings, and by the best of the learning rates."""
    rows = []
    for name in runner.names():
        if not VARIANTS[name].in_fvu or (default := runner.run(name, job)) is None:
            continue
        tuned = {rate: runner.run(name, replace(job, learning_rate=rate)) for rate in learning_rates}
        found = {rate: result["fvu"] for rate, result in tuned.items() if result is not None}
        best = min(found, key=found.__getitem__, default=None)
        at_best = "-" if best is None else f"{found[best]:.3f} at {best:g}"
        rows.append([name, f"{default['fvu']:.3f}", at_best, f"{default['tokens_per_second']:,.0f}"])
    header = [f"{job.tokens:,} tokens, batch {job.batch}, {job.dtype}", "FVU, defaults", "FVU, tuned", "tokens/s"]
    return markdown_table(header, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for library in ("saelens", "sparsify", "dictionary-learning"):
        parser.add_argument(f"--{library}-python", metavar="PATH", help=f"interpreter that has {library}")
    parser.add_argument("--only", choices=["speed", "fvu"])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="of one measurement of speed")
    parser.add_argument("--warmup-tokens", type=int, default=8192, help="before it")
    parser.add_argument("--activations", type=Path, help="safetensors for speed; structured random ones by default")
    parser.add_argument("--fvu-activations", type=Path, help="safetensors for FVU; the same kind by default")
    parser.add_argument("--fvu-tokens", type=int, default=280_000)
    parser.add_argument("--fvu-batches", type=int, nargs="+", default=[1024])
    parser.add_argument("--learning-rates", type=float, nargs="*", default=[1e-3, 2e-3])
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def tables(args: argparse.Namespace, folder: Path) -> list[str]:
    pythons = {"sae_lens": args.saelens_python, "sparsify": args.sparsify_python}
    runner = Runner(pythons | {"dictionary_learning": args.dictionary_learning_python})
    sizes = {"d_sae": args.d_sae, "k": args.k}
    found = []
    if args.only != "fvu":
        file = args.activations or folder / "speed.safetensors"
        if args.activations is None:
            write_structured(file, max(args.tokens + args.warmup_tokens, *args.batches), 256, D_IN)
        base = Job(str(file.resolve()), tokens=args.tokens, warmup_tokens=args.warmup_tokens, **sizes)
        for dtype in args.dtypes:
            for batch in args.batches:
                found.append(measure_speed(runner, replace(base, batch=batch, dtype=dtype), args.rounds))
                print(found[-1], "\n", flush=True)
    if args.only != "speed":
        file = args.fvu_activations or folder / "fvu.safetensors"
        if args.fvu_activations is None:
            write_structured(file, args.fvu_tokens, HELDOUT, D_IN)
        job = Job(str(file.resolve()), tokens=args.fvu_tokens, warmup_tokens=0, fvu=True, **sizes)
        for batch in args.fvu_batches:
            found.append(measure_fvu(runner, replace(job, batch=batch), args.learning_rates))
            print(found[-1], "\n", flush=True)
    return [*found, " · ".join([environment(), *sorted(runner.versions)])]


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        text = "\n\n".join(tables(args, Path(folder)))
    print(text.rsplit("\n\n", 1)[-1])
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
