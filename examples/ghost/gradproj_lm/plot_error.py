"""How far inner products of projected gradients are from exact ones, against the numbers stored; see README.md."""

import argparse
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from project import load_model, load_tokenizer, make_blocks, make_parser, pattern_of
from torch import Tensor, nn

from hf_gradtools.ghost.gradproj.projector import GradProjector


FORMS = {
    "two stages": {"stages": 2},  # layers added into one sketch
    "one stage": {"stages": 1},  # a share of the numbers for each layer
}
BYTES_OF_GRADIENTS = 2**29  # held at once for the exact inner products


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(max_samples=96)
    add = parser.add_argument
    add("--dims", type=int, nargs="+", default=[256, 1024, 4096], help="numbers stored per sample, in turn")
    add("--num_queries", type=int, default=16, help="of the samples, which are compared with the others")
    add("--output_dir", default="out/gradproj_lm", help="folder of error.csv and error.png")
    return parser.parse_args()


def layer_groups(model: nn.Module, patterns: str | list[str], rows: int) -> Iterator[list[str]]:
    """Names of layers whose whole gradients of so many rows fit in memory together."""
    group: list[str] = []
    size = 0
    for layer in GradProjector(model, layers=patterns, stages=1).layers:
        own = 4 * rows * sum(p.numel() for p in layer.parameters.values())
        if group and size + own > BYTES_OF_GRADIENTS:
            yield group
            group, size = [], 0
        group.append(f"^{layer.name}$".replace(".", r"\."))
        size += own
    yield group


def exact_products(model: nn.Module, patterns: str | list[str], queries: Dataset, rows: Dataset, batch: int) -> Tensor:
    """`[Q, N]` inner products of whole gradients, added up over groups of layers."""
    total = torch.zeros(len(queries), len(rows))
    for names in layer_groups(model, patterns, len(queries) + len(rows)):
        exact = GradProjector(model, layers=names, stages=1, rank=(None, None))
        total += exact.gradients(queries, batch_size=batch) @ exact.gradients(rows, batch_size=batch).T
    return total


def compare(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Correlation, relative error, and the share of the ten nearest rows that is found."""
    top = min(10, exact.shape[1])
    pairs = zip(exact.topk(top).indices.tolist(), found.topk(top).indices.tolist(), strict=True)
    hits = sum(len(set(ours) & set(theirs)) for ours, theirs in pairs)
    return {
        "pearson": float(torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]),
        "relative_error": float((found - exact).norm() / exact.norm()),
        "recall_at_10": hits / (top * len(exact)),
    }


def measure(args: argparse.Namespace) -> list[dict[str, float | str]]:
    """A line for each form and size."""
    tokenizer = load_tokenizer(args)
    model, blocks = load_model(args, tokenizer), make_blocks(args, tokenizer).remove_columns("text")
    if len(blocks) <= args.num_queries:
        raise SystemExit(f"--num_queries {args.num_queries} leaves nothing of {len(blocks)} samples; lower it")
    spread = len(blocks) // args.num_queries
    chosen = range(0, spread * args.num_queries, spread)
    queries, rows = blocks.select(chosen), blocks.select(sorted(set(range(len(blocks))) - set(chosen)))
    patterns = pattern_of(args)
    exact = exact_products(model, patterns, queries, rows, args.batch_size)
    table = []
    for form, options in FORMS.items():
        for dim in args.dims:
            projector = GradProjector(model, layers=patterns, proj_rank_total=dim, seed=args.proj_seed, **options)
            with tempfile.TemporaryDirectory() as folder:
                store = projector.project(rows, output_dir=folder, batch_size=args.batch_size)
                found = projector.gradients(queries) @ store.rows(range(len(store))).T
            table.append({"form": form, "dim": projector.dim, **compare(found, exact)})
            print("{form:10}  {dim:>6}  {pearson:.4f}  {relative_error:.4f}  {recall_at_10:.3f}".format(**table[-1]))
    return table


def plot(table: list[dict[str, float | str]], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot without matplotlib: pip install 'hf_gradtools[viz]'")
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"relative_error": "Relative error of inner products", "recall_at_10": "Ten nearest that are found"}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for form in FORMS:
            lines = sorted((line["dim"], line[column]) for line in table if line["form"] == form)
            axis.plot(*zip(*lines, strict=True), marker="o", label=form)
        axis.set(xscale="log", title=title, xlabel="numbers stored per sample")
        sizes = sorted({line["dim"] for line in table if line["form"] == "two stages"})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def main() -> None:
    args = parse_arguments()
    table = measure(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "error.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    print(f"table: {folder / 'error.csv'}")
    plot(table, folder / "error.png")


if __name__ == "__main__":
    main()
