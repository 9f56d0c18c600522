"""Projected gradients of every sample of a small MLP: synthetic data, no download, seconds.

Every sample's gradient is stored as a few numbers. Their inner products are compared with those of whole gradients,
and for a few held-out points the training samples with the nearest gradients are shown.

    python examples/ghost/ghost_gradproj_mlp.py --mode project --proj_rank_total 64
"""

import argparse
import tempfile

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_gradtools.ghost.gradproj.projector import GradProjector


INPUTS, HIDDEN, CLASSES = 16, 32, 3
MODES = {  # options of GradProjector
    "project": {"stages": 2},  # a generous projection of each layer, then one sketch of all of them
    "one_stage": {"stages": 1},  # a small projection of each layer, side by side
    "exact": {"stages": 1, "rank": (None, None)},  # whole gradients
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--mode", choices=list(MODES), default="project", help="what is stored of a gradient")
    add("--proj_rank_total", type=int, default=64, help="numbers stored per sample; exact stores all")
    add("--proj_seed", type=int, default=0, help="of the projection")
    add("--num_samples", type=int, default=300, help="training samples")
    add("--num_queries", type=int, default=40, help="held-out points")
    add("--batch_size", type=int, default=32, help="samples of a forward pass")
    add("--train_steps", type=int, default=30, help="before gradients are taken")
    add("--output_dir", help="folder of the store; default a temporary one")
    add("--seed", type=int, default=0, help="of data and weights")
    return parser.parse_args()


def make_samples(centres: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
    y = torch.randint(CLASSES, (count,))
    x = centres[y] + 1.5 * torch.randn(count, INPUTS)
    return [{"x": point, "y": label} for point, label in zip(x, y, strict=True)]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def batch_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch["x"]), batch["y"])


def train(model: nn.Module, rows: list[dict[str, torch.Tensor]], steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        batch_loss(model, collate(rows)).backward()
        optimizer.step()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    centres = torch.randn(CLASSES, INPUTS)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.LayerNorm(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    samples, queries = make_samples(centres, args.num_samples), make_samples(centres, args.num_queries)
    train(model, samples, args.train_steps)

    shared = {"layers": None, "loss_fn": batch_loss, "data_collator": collate, "seed": args.proj_seed}
    options = dict(MODES[args.mode])
    if args.mode != "exact":
        options["proj_rank_total"] = args.proj_rank_total
    projector = GradProjector(model, **shared, **options)
    folder = args.output_dir or tempfile.mkdtemp()
    store = projector.project(samples, output_dir=folder, batch_size=args.batch_size)
    info = store.info()
    size = sum(p.numel() for p in model.parameters())
    print(f"\n{len(store)} samples; {store.dim} of {size} numbers each, {info['bytes_per_sample']:.0f} bytes on disk")

    exact = GradProjector(model, **shared, **MODES["exact"])
    whole = exact.gradients(queries) @ exact.gradients(samples).T
    stored = projector.gradients(queries) @ store.rows(range(len(store))).T
    correlation = torch.corrcoef(torch.stack([whole.flatten(), stored.flatten()]))[0, 1]
    print(f"inner products with whole gradients and with stored ones: correlation {correlation:.4f}, ", end="")
    print(f"relative error {((stored - whole).norm() / whole.norm()):.4f}")
    top = min(10, len(store))
    nearest = [set(products.topk(top).indices.tolist()) for products in whole]
    found = [set(products.topk(top).indices.tolist()) for products in stored]
    recall = sum(len(a & b) for a, b in zip(nearest, found, strict=True)) / (top * len(nearest))
    print(f"of the {top} nearest samples by whole gradients, stored ones find {recall:.0%}")

    print("\nquery  class   nearest samples: number (class) cosine")
    for number in range(min(3, len(queries))):
        hits = store.search(queries[number : number + 1], k=5, metric="cosine")
        shown = "  ".join(f"{hit['row']:>3} ({samples[hit['row']]['y']}) {hit['score']:+.2f}" for hit in hits)
        print(f"{number:>5}  {queries[number]['y']:>5}   {shown}")


if __name__ == "__main__":
    main()
