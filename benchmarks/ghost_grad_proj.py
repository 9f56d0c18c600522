"""Projected gradients: how fast they are made, and how well they keep inner products.

```
python benchmarks/ghost_grad_proj.py --only speed
python benchmarks/ghost_grad_proj.py --only quality --model ID --text FILE [FILE ...]
```

speed: samples/s of other ways to get a few numbers of each sample's gradient, and of ours, over those of a plain
forward and backward pass in the same rounds, by CPU time.

quality: of real text on a trained model, the inner products of corpus and query gradients before and after, for the
two stages (the default ranks, 64 everywhere, main directions) and for one stage with as many numbers. The exact ones
are made by plain hooks, layer by layer. What is fitted is fitted on corpus rows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Variant,
    environment,
    gpt2,
    llama,
    markdown_table,
    random_rows,
    smollm2,
    time_interleaved,
)  # fmt: skip
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from hf_gradtools.core.projection import Projection
from hf_gradtools.ghost.gradproj.batches import BatchMaker
from hf_gradtools.ghost.gradproj.collector import ProjectionCollector
from hf_gradtools.ghost.gradproj.projector import GradProjector


DIMS = (256, 1024, 4096)
STORE_BATCHES = 4  # of a project() call
HOOK_RANK = 16
TRAK_DIM, TRAK_CHUNK = 32, 2**18


# ---- speed


@dataclass(frozen=True)
class Shape:
    """What is projected: a model, S tokens in each of B rows."""

    title: str
    build: Callable[[], nn.Module]
    tokens: int
    batch: int
    rounds: int
    ways: tuple[str, ...]


ALL_WAYS = ("floor", *map(str, DIMS), "store", "hooks", "loop", "trak")
FEWER_WAYS = ("floor", *map(str, DIMS), "hooks")


def small(title: str, build: Callable[[], nn.Module], tokens: int) -> Shape:
    return Shape(title, build, tokens, 1024 // tokens, rounds=3, ways=ALL_WAYS if tokens == 128 else FEWER_WAYS)


SHAPES = {
    f"{kind}-S{tokens}": small(title, partial(build, 256, 4), tokens)
    for kind, title, build in (("llama", "Llama d=256 L=4", llama), ("gpt2", "GPT-2 d=256 L=4", gpt2))
    for tokens in (128, 256, 512)
}
SHAPES["smollm2"] = Shape("SmolLM2-135M", smollm2, 256, 4, 2, ways=("floor", "1024", "hooks"))


class SpeedBench:
    """A model with a batch, and each way to get the samples' numbers."""

    def __init__(self, shape: Shape):
        torch.manual_seed(0)
        self.shape = shape
        self.model = shape.build().eval()
        self.model.config.use_cache = False
        self.rows = random_rows(shape.batch, shape.tokens, seed=0)
        self.batch = BatchMaker(self.model, None)(self.rows, range(shape.batch))
        layers = GradProjector(self.model).layers
        self.modules: list[nn.Module] = [layer.module for layer in layers]
        self.weights = {n: p.detach() for n, p in self.model.named_parameters() if p in self.weight_set()}

    def weight_set(self) -> set[nn.Parameter]:
        return {module.weight for module in self.modules}  # type: ignore[misc]

    def plain(self) -> None:
        self.model(**self.batch)["loss"].backward()
        self.model.zero_grad()

    # ours

    def pass_alone(self, dim: int) -> Variant:
        projector = GradProjector(self.model, proj_rank_total=dim)
        projector.prepare(self.rows)
        collector = ProjectionCollector(projector.layers, projector.projection)
        gradient_pass = projector._pass
        return Variant(lambda: gradient_pass.project(collector, self.batch), lambda: gradient_pass.observed(collector))

    def store(self) -> Variant:
        """The whole call: hashes of the model and the data, the pass, the rows on disk."""
        projector = GradProjector(self.model)
        rows = random_rows(STORE_BATCHES * self.shape.batch, self.shape.tokens, seed=0)
        projector.prepare(rows)

        def run() -> None:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                store = projector.project(rows, output_dir=folder, batch_size=self.shape.batch)
                self.store_bytes = store.info()["bytes_per_sample"]

        return Variant(run)

    # others

    def floor(self) -> Variant:
        """Forward, and backward of nothing but activations, as far as the first layer that is projected."""

        @contextlib.contextmanager
        def frozen() -> Iterator[None]:
            def anchor(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                return output if output.requires_grad else output.requires_grad_()

            hooks = [module.register_forward_hook(anchor) for module in self.modules]
            self.model.requires_grad_(False)
            yield
            self.model.requires_grad_(True)
            for hook in hooks:
                hook.remove()

        return Variant(lambda: self.model(**self.batch)["loss"].backward(), frozen)

    def hooks(self) -> Variant:
        """Full backward hooks that project each layer's per-sample gradient; autograd makes weight gradients too."""
        inputs: dict[nn.Module, Tensor] = {}
        found: list[Tensor] = []
        bases = {module: [torch.randn(d, HOOK_RANK) for d in sides(module)] for module in self.modules}

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[module] = args[0].detach()

        def project(module: nn.Module, grad_input: Any, grad_output: tuple[Tensor, ...]) -> None:
            p_in, p_out = bases[module]
            small = torch.einsum("nso,nsi->noi", grad_output[0] @ p_out, inputs.pop(module) @ p_in)
            found.append(small.flatten(1))

        @contextlib.contextmanager
        def hooked() -> Iterator[None]:
            handles = [module.register_forward_hook(keep) for module in self.modules]
            handles += [module.register_full_backward_hook(project) for module in self.modules]
            yield
            for handle in handles:
                handle.remove()

        def run() -> Tensor:
            found.clear()
            self.plain()
            return torch.cat(found, 1)

        return Variant(run, hooked)

    def loop(self) -> None:
        """One backward pass per sample, and nothing done with its gradient."""
        for n in range(self.shape.batch):
            self.model(**{name: value[n : n + 1] for name, value in self.batch.items()})["loss"].backward()
            self.model.zero_grad()

    def trak(self) -> Tensor:
        """Per-sample gradients by torch.func, times a random matrix that is made chunk by chunk."""

        def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
            return functional_call(self.model, weights, (), {"input_ids": ids[None], "labels": ids[None]})["loss"]

        grads = vmap(grad(loss), in_dims=(None, 0))(self.weights, self.batch["input_ids"])
        generator = torch.Generator().manual_seed(0)
        rows = torch.zeros(self.shape.batch, TRAK_DIM)
        for each in grads.values():
            for chunk in each.flatten(1).split(TRAK_CHUNK, 1):
                signs = torch.empty(chunk.shape[1], TRAK_DIM).bernoulli_(0.5, generator=generator)
                rows += chunk @ signs.mul_(2).sub_(1)
        return rows

    def variant(self, way: str) -> Variant:
        if way.isdigit():
            return self.pass_alone(int(way))
        return Variant(getattr(self, way)) if way in ("plain", "loop", "trak") else getattr(self, way)()

    def bytes_per_sample(self, way: str) -> str:
        count = len(self.modules) * HOOK_RANK**2 if way == "hooks" else TRAK_DIM
        if way in ("hooks", "trak") or way.isdigit():
            return f"{2 * (int(way) if way.isdigit() else count):,}"
        return f"{self.store_bytes:,.0f}" if way == "store" else ""


def sides(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs)"""
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else tuple(module.weight.shape[::-1])  # type: ignore[return-value]


WAYS = {
    "plain": "plain forward + backward",
    "floor": "floor: no weight gradients, nothing projected",
    **{str(dim): f"**ours, k={dim:,}**" for dim in DIMS},
    "store": "**ours, k=1,024, `project()` with its store**",
    "hooks": f"unfused hooks, {HOOK_RANK}x{HOOK_RANK} a layer",
    "loop": "loop, batch 1, nothing projected",
    "trak": f"vmap(grad) times a dense random matrix, k={TRAK_DIM} only",
}


def speed_table(shape: Shape, rounds: int | None) -> str:
    bench = SpeedBench(shape)
    variants = {way: bench.variant(way) for way in ("plain", *shape.ways)}
    if shape.rounds > 2:
        time_interleaved(variants, 1)  # warm
    times = time_interleaved(variants, rounds or shape.rounds)
    lines = []
    for way in variants:
        passes = STORE_BATCHES if way == "store" else 1
        against = [f"{passes / times[way].ratio(times[base], 'cpu'):.2f}" for base in ("plain", "floor")]
        per_second = shape.batch * passes / statistics.median(times[way].cpu)
        lines.append([WAYS[way], f"{per_second:.2f}", *against, bench.bytes_per_sample(way)])
    headers = ["way", "samples/s", "÷ plain", "÷ floor", "bytes a sample"]
    title = f"**{shape.title}, S={shape.tokens}, B={shape.batch}**, {len(times['plain'].cpu)} rounds"
    return f"{title}\n\n{markdown_table(headers, lines)}"


# ---- quality

QUALITY_DIMS = (256, 1024, 4096, 7168)
TOKENS, CORPUS, QUERIES = 128, 192, 48
BATCH = 8


def text_rows(tokenizer: Any, files: list[Path]) -> Dataset:
    """Blocks of text, as many of each file, in random order: the corpus, then the queries."""
    generator, blocks = torch.Generator().manual_seed(0), []
    for file in files:
        ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
        cut = torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS)
        count = (CORPUS + QUERIES) // len(files)
        blocks.append(cut[torch.randperm(len(cut), generator=generator)[:count]])
    rows = torch.cat(blocks)
    rows = rows[torch.randperm(len(rows), generator=generator)].tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


class ExactProducts:
    """Inner products of per-sample gradients by plain hooks: those of queries are kept, the corpus streams by."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]):
        self.model, self.modules = model, modules

    def __call__(self, queries: Tensor, corpus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Products `[corpus, queries]`, squared norms of the corpus and of the queries."""
        kept: dict[str, list[Tensor]] = defaultdict(list)
        for part in queries.split(BATCH):
            self._run(part, lambda name, grads: kept[name].append(grads))
        whole = {name: torch.cat(kept.pop(name)) for name in list(kept)}
        products, norms = torch.zeros(len(corpus), len(queries)), torch.zeros(len(corpus))
        for start in range(0, len(corpus), BATCH):
            rows = slice(start, start + BATCH)

            def add(name: str, grads: Tensor, rows: slice = rows) -> None:
                products[rows] += grads @ whole[name].T
                norms[rows] += grads.square().sum(1)

            self._run(corpus[rows], add)
        return products, norms, sum(grads.square().sum(1) for grads in whole.values())  # type: ignore[return-value]

    def _run(self, ids: Tensor, take: Callable[[str, Tensor], None]) -> None:
        def tap(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            a = args[0].detach()
            output.register_hook(lambda g: take(name, torch.bmm(g.mT, a).flatten(1)))

        handles = [module.register_forward_hook(partial(tap, name)) for name, module in self.modules.items()]
        (self.model(input_ids=ids, labels=ids)["loss"] * len(ids)).backward()  # rows are as long: sum of their means
        self.model.zero_grad()
        for handle in handles:
            handle.remove()


class SideBySide:
    """Several projections with the same bases, such as sketches of other sizes, as one."""

    def __init__(self, parts: list[Projection]):
        self.parts, self.bases, self.dims = parts, parts[0].bases, [part.dim for part in parts]
        self.dim = sum(self.dims)

    def add(self, rows: Tensor, name: str, projected: Tensor) -> None:
        for part, columns in zip(self.parts, rows.split(self.dims, 1), strict=True):
            part.add(columns, name, projected)


class Together:
    """Several collectors on one backward pass."""

    def __init__(self, collectors: list[ProjectionCollector]):
        self.collectors = collectors

    def begin(self, *args: Any) -> None:
        for collector in self.collectors:
            collector.begin(*args)

    def take(self) -> Tensor:
        return torch.cat([collector.take() for collector in self.collectors], 1)

    def rows(self) -> int | None:
        counts = [collector.rows() for collector in self.collectors]
        return None if None in counts else counts[0]

    def observe(self, layer: Any, call: Any) -> None:
        for collector in self.collectors:
            collector.observe(layer, call)

    def seen(self, layer: Any) -> None:
        pass

    def wants_takeover(self, *args: Any) -> bool:
        return False


TWO_STAGES: dict[str, dict[str, Any]] = {
    "**two stages, ranks by energy (default)**": {},
    "two stages, 64x64 orthonormal": {"rank": 64},
    "two stages, 64x64 pca": {"rank": 64, "basis": "pca"},
}
ONE_STAGE = {f"one stage, {basis}": basis for basis in ("orthonormal", "rademacher", "gaussian")}


def all_gradients(model: nn.Module, rows: Dataset, seeds: int) -> dict[tuple[str, int], list[Tensor]]:
    """By form and size, the projected gradients of all rows for each seed."""
    corpus = rows.select(range(CORPUS))
    names: list[tuple[str, int]] = []
    collectors = []

    def observe(projector: GradProjector, projection: Any, form: str, dims: list[int]) -> None:
        collectors.append(ProjectionCollector(projector.layers, projection))
        names.extend((form, dim) for dim in dims)

    for seed in range(seeds):
        for form, options in TWO_STAGES.items():
            projector = GradProjector(model, seed=seed, **options)
            projector.prepare(corpus)
            blocks, bases = list(projector.projection.blocks.values()), projector.projection.bases
            parts = [Projection(blocks, bases, dim, seed) for dim in QUALITY_DIMS]
            observe(projector, SideBySide(parts), form, list(QUALITY_DIMS))
        for form, basis in ONE_STAGE.items():
            for dim in QUALITY_DIMS:
                projector = GradProjector(model, stages=1, proj_rank_total=dim, basis=basis, seed=seed)
                observe(projector, projector.projection, form, [dim])
    widths = [w for c in collectors for w in getattr(c.projection, "dims", [c.projection.dim])]
    batches, found = BatchMaker(model, None), []
    with projector._pass.observed(Together(collectors)) as together:
        for start in range(0, len(rows), BATCH):
            found.append(
                projector._pass.project(together, batches(rows, range(start, min(start + BATCH, len(rows)))))[0]
            )
    by_name: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for name, part in zip(names, torch.cat(found).split(widths, 1), strict=True):
        by_name[name].append(part)
    return by_name


def pearson(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]).double())[0, 1])


def spearman(x: Tensor, y: Tensor) -> float:
    return pearson(x.flatten().argsort().argsort(), y.flatten().argsort().argsort())


def recall(found: Tensor, exact: Tensor, k: int = 10) -> float:
    """Of each query's k largest products, the share that is found. `[corpus, queries]` both."""
    tops = [{tuple(pair) for pair in top_pairs(scores, k)} for scores in (found, exact)]
    return len(tops[0] & tops[1]) / len(tops[1])


def top_pairs(scores: Tensor, k: int) -> list[list[int]]:
    best = scores.topk(k, dim=0).indices
    return torch.stack([best.flatten(), torch.arange(best.shape[1]).repeat(k)], 1).tolist()


def quality_table(model_id: str, files: list[Path], seeds: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32).eval()
    rows = text_rows(AutoTokenizer.from_pretrained(model_id), files)
    ids = torch.tensor(rows["input_ids"])
    modules = {layer.name: layer.module for layer in GradProjector(model).layers}
    exact, norms, query_norms = ExactProducts(model, modules)(ids[CORPUS:], ids[:CORPUS])
    exact_cosines = exact / norms.sqrt()[:, None] / query_norms.sqrt()
    lines = []
    for (form, dim), each in all_gradients(model, rows, seeds).items():
        scores: dict[str, list[float]] = defaultdict(list)
        for gradients in each:
            products = gradients[:CORPUS] @ gradients[CORPUS:].T
            lengths = gradients.norm(dim=1)
            cosines = products / lengths[:CORPUS, None] / lengths[CORPUS:]
            scores["pearson"].append(pearson(products, exact))
            scores["spearman"].append(spearman(products, exact))
            scores["cosine"].append(pearson(cosines, exact_cosines))
            scores["recall"].append(recall(products, exact))
        cells = [f"{statistics.fmean(values):.3f} ({min(values):.3f})" for values in scores.values()]
        lines.append([form, f"{dim:,}", f"{each[0].shape[1]:,}", *cells])
    lines.sort(key=lambda line: (int(line[1].replace(",", "")), "one stage" in line[0]))
    headers = ["form", "numbers", "Pearson", "Spearman", "Pearson of cosines", "recall@10"]
    size = sum(module.weight.numel() for module in modules.values())  # type: ignore[operator]
    title = (
        f"**{model_id.rstrip('/').split('/')[-1]}**, {len(modules)} layers of {size:,} weights; {CORPUS} corpus "
        f"rows x {QUERIES} queries of {TOKENS} tokens; mean of {seeds} seeds (least)"
    )
    return f"{title}\n\n{markdown_table(headers, [[line[0], *line[2:]] for line in lines])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "quality"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, help="timed rounds of every shape (default: about 5 minutes in all)")
    parser.add_argument("--model", default="roneneldan/TinyStories-33M", help="trained causal LM: Hub id or folder")
    parser.add_argument("--text", type=Path, nargs="+", help="text files, for the quality of projections")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.only != "speed" and not options.text:
        parser.error("--text is needed to measure quality; --only speed does without")
    if options.only != "quality":
        for name in options.shapes:
            print(speed_table(SHAPES[name], options.rounds), end="\n\n", flush=True)
    if options.only != "speed":
        print(quality_table(options.model, options.text, options.seeds), end="\n\n", flush=True)
    print(environment())


if __name__ == "__main__":
    main()
