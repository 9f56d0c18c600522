"""Search over stored gradients: memory, and time against a bare blocked matrix product over the same file.

```
python benchmarks/ghost_grad_search.py [--rows 1000000] [--dim 1024] [--rounds 3] [--folder DIR] [--output table.md]
```

Writes a synthetic store of random float16 gradients, deleted afterwards. Peak resident memory is that of a fresh
process that writes, or opens and searches; beside it stands that of a process which only imports the package. The
bare product goes through the same numbers in one raw file, memory-mapped by numpy: blocks become float32 and are
multiplied by the queries in torch; it keeps no best rows, and its block length is the fastest of those tried. The two
run in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import environment, markdown_table

from hf_gradtools.ghost.gradproj.store import GradientStore, GradientWriter


ROWS_PER_APPEND = 2_000
QUERIES = (1, 16, 200)
BARE_ROWS = (500, 1_000, 2_000, 8_000)
K = 10


def write(folder: Path, rows: int, dim: int) -> dict[str, float]:
    """A store and, from the same numbers, a raw file."""
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    with (
        GradientWriter(folder / "store", {"model": "synthetic"}, dim=dim) as writer,
        open(folder / "raw", "wb") as raw,
    ):
        for first in range(0, rows, ROWS_PER_APPEND):
            count = min(ROWS_PER_APPEND, rows - first)
            gradient = torch.randn(count, dim, generator=generator)
            start = time.perf_counter()
            writer.append({"sample_id": list(range(first, first + count)), "gradient": gradient})
            seconds += time.perf_counter() - start
            raw.write(gradient.half().numpy().tobytes())
        start = time.perf_counter()
        writer.finish()
    return {"seconds": seconds + time.perf_counter() - start}


def search(folder: Path, rows: int, dim: int) -> dict[str, float]:
    GradientStore.open(folder / "store").search(queries_of(200, dim), k=K, progress=False)
    return {}


def fisher(folder: Path, rows: int, dim: int) -> dict[str, float]:
    store = GradientStore.open(folder / "store")
    start = time.perf_counter()
    store.search(queries_of(16, dim), k=K, precondition="fisher", progress=False)
    first = time.perf_counter() - start
    start = time.perf_counter()
    GradientStore.open(folder / "store").search(queries_of(16, dim), k=K, precondition="fisher", progress=False)
    return {"seconds": first, "again": time.perf_counter() - start}


def verify(folder: Path, rows: int, dim: int) -> dict[str, float]:
    start = time.perf_counter()
    report = GradientStore.open(folder / "store").verify(progress=False)
    return {"seconds": time.perf_counter() - start, "bytes": report.bytes}


def imports(folder: Path, rows: int, dim: int) -> dict[str, float]:
    return {}


STAGES: dict[str, Callable[[Path, int, int], dict[str, float]]] = {
    "imports": imports, "write": write, "search": search, "fisher": fisher, "verify": verify
}  # fmt: skip


def in_fresh_process(stage: str, folder: Path, rows: int, dim: int) -> dict[str, float]:
    """What a stage reports, and `peak`, its process' largest resident set in MiB."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder), "--rows", str(rows)]
    result = subprocess.run([*command, "--dim", str(dim)], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def queries_of(count: int, dim: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(count))


def bare(raw: Path, rows: int, queries: torch.Tensor, block: int) -> None:
    numbers = np.memmap(raw, dtype=np.float16, mode="r", shape=(rows, queries.shape[1]))
    transposed = queries.T.contiguous()
    for first in range(0, rows, block):
        torch.from_numpy(numbers[first : first + block]).float() @ transposed


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(folder: Path, rows: int, count: int, dim: int, rounds: int) -> list[str]:
    """The two ways in turn: medians, and the median of the rounds' ratios."""
    store, raw, queries = GradientStore.open(folder / "store"), folder / "raw", queries_of(count, dim)
    part = min(rows, 200_000)
    trials = {block: [seconds_of(partial(bare, raw, part, queries, block)) for _ in range(2)] for block in BARE_ROWS}
    block = min(BARE_ROWS, key=lambda block: min(trials[block]))
    ways = {
        "bare": partial(bare, raw, rows, queries, block),
        "ours": partial(store.search, queries, K, progress=False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in sorted(ways, reverse=bool(number % 2)):
            taken = seconds_of(ways[name])
            if number:  # the first round warms up
                times[name].append(taken)
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["bare"], strict=True))
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "bare"))
    return [str(count), f"{ours:.2f}", f"{theirs:.2f} ({block:,})", f"{ratio:.2f}", f"{rows / ours / 1e6:.2f}"]


def report(folder: Path, rows: int, dim: int, rounds: int) -> Iterator[str]:
    """The sections one after the other, as they are measured."""
    found = {stage: in_fresh_process(stage, folder, rows, dim) for stage in STAGES}
    per_row = sum(file.stat().st_size for file in (folder / "store").glob("shard-*")) / rows
    gigabytes = per_row * rows / 1e9
    yield (
        f"{rows:,} rows of {dim:,} float16: {gigabytes:.2f} GB, {per_row:,.1f} bytes per row "
        f"({per_row / (2 * dim) - 1:.1%} above the bare numbers)."
    )
    yield markdown_table(
        ["process", "peak resident MiB"], [[stage, f"{found[stage]['peak']:,.0f}"] for stage in STAGES]
    )
    yield (
        f"Writing with checksums: {gigabytes / found['write']['seconds']:.2f} GB/s. "
        f"`verify`: {found['verify']['bytes'] / 1e9 / found['verify']['seconds']:.2f} GB/s. "
        f"16 queries with the Fisher matrix: {found['fisher']['seconds']:.1f} s the first time, "
        f"{found['fisher']['again']:.1f} s with the one that was kept."
    )
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    speed = [compare(folder, rows, count, dim, rounds) for count in QUERIES]
    yield markdown_table(["queries", "search s", "bare s (rows per block)", "ratio", "10^6 rows/s"], speed)
    yield environment()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the temporary folder is made")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        result = STAGES[args.stage](args.folder, args.rows, args.dim)
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return
    sections = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for section in report(Path(folder), args.rows, args.dim, args.rounds):
            print(section + "\n", flush=True)
            sections.append(section)
    if args.output:
        args.output.write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
