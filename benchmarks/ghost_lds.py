"""Linear datamodeling score: do attributions predict what retraining on half of the data does to a test sample's loss?

```
python benchmarks/ghost_lds.py --data reviews.jsonl [--model ID] [--subsets 100] [--cache DIR]
```

The task: sentiment of sentences (columns `text`, `score`; as VADER's movie reviews) by a small transformer on the
token states of a frozen language model. It is trained again on random halves of the training rows, with other initial
weights and orders each time. For a test sample, the score of a half is the sum of its rows' scores; the LDS is the
Spearman correlation over the halves of that sum and the falling loss, averaged over test samples (TRAK, arXiv
2303.14186, §4).

Of the Fisher matrix the damping is chosen on the first half of the test samples, for each form by itself; all that is
reported is of the other half. The exact gradients' Fisher matrix is inverted through their inner products.

`--traker` adds TRAK itself (`pip install traker`), on the same models, with its BasicProjector.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import environment, markdown_table
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, normalize
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_gradtools.demo import demo_model_path
from hf_gradtools.ghost.gradproj.batches import BatchMaker
from hf_gradtools.ghost.gradproj.ensemble import GradientEnsemble
from hf_gradtools.ghost.gradproj.projector import GradProjector
from hf_gradtools.ghost.gradproj.store import GradientStore


MAX_TOKENS = 32
WIDTH = 64
EPOCHS, TRAIN_BATCH, LEARNING_RATE = 6, 25, 2e-3
DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)  # as shares of the mean eigenvalue at 1,024 numbers
DIMS = (256, 1024)
TRAK_DIM = 256  # below the number of training rows, since its kernel is not damped by default
BOOTSTRAPS = 200


# ---- the task


class Classifier(nn.Module):
    """A transformer of one layer on frozen token states, which `input_ids` count through.

    Args:
        states: `[rows * MAX_TOKENS, d]`.
    """

    def __init__(self, states: Tensor):
        super().__init__()
        self.register_buffer("states", states, persistent=False)
        self.reduce = nn.Linear(states.shape[1], WIDTH)
        config = BertConfig(
            vocab_size=1, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=2 * WIDTH,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=MAX_TOKENS,
            attn_implementation="eager",
        )  # fmt: skip
        self.encoder = BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        tokens = self.reduce(embedding(input_ids, self.states))
        # The mask as it is added to attention: what transformers makes of a short one, vmap cannot trace.
        mask = torch.where(attention_mask.bool(), 0.0, torch.finfo(tokens.dtype).min)[:, None, None]
        logits = self.encoder(inputs_embeds=tokens, attention_mask=mask).logits
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


@dataclass
class Task:
    """Rows of training and test, and the states that they point to."""

    states: Tensor
    train: Dataset
    test: Dataset

    def batch(self, rows: Dataset, indices: Sequence[int] | None = None) -> dict[str, Tensor]:
        return BatchMaker(Classifier(self.states), None)(rows, range(len(rows)) if indices is None else indices)


@torch.no_grad()
def make_task(options: argparse.Namespace) -> Task:
    """Sentences that are not neutral; states from the middle of the language model, where meaning is said to be."""
    with open(options.data) as file:
        lines = [json.loads(line) for line in file]
    lines = [line for line in lines if abs(line["score"]) >= 1]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [lines[i] for i in order[: options.train_rows + options.test_rows]]
    folder = options.model or demo_model_path()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.layers = model.layers[: len(model.layers) // 2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, states = [], torch.zeros(len(lines), MAX_TOKENS, model.config.hidden_size)
    for n, line in enumerate(lines):
        ids = tokenizer(line["text"], truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
        states[n, : ids.shape[1]] = model(ids, use_cache=False).last_hidden_state[0]
        places = list(range(n * MAX_TOKENS, n * MAX_TOKENS + ids.shape[1]))
        rows.append({"input_ids": places, "labels": int(line["score"] > 0)})
    states = states.flatten(0, 1)
    used = states[states.abs().sum(1) > 0]
    states = (states - used.mean(0)) / used.std(0)  # a few coordinates are far larger than all others
    cut = options.train_rows
    return Task(states, Dataset.from_list(rows[:cut]), Dataset.from_list(rows[cut:]))


@dataclass
class Trained:
    """A model at some point of its training, and its optimizer."""

    model: Classifier
    optimizer: torch.optim.AdamW
    learning_rate: float


def train(
    task: Task, everything: dict[str, Tensor], rows: Tensor, seed: int, at_epoch: Callable[[Trained], Any] = id
) -> Trained:
    """Trains on some rows, the learning rate falling to a tenth; `at_epoch` is called after each pass over them."""
    torch.manual_seed(seed)
    model = Classifier(task.states).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    steps = EPOCHS * -(-len(rows) // TRAIN_BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    state = Trained(model, optimizer, LEARNING_RATE)
    for _ in range(EPOCHS):
        for chosen in rows[torch.randperm(len(rows))].split(TRAIN_BATCH):
            optimizer.zero_grad()
            model(**{name: values[chosen] for name, values in everything.items()})["loss"].backward()
            state.learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
        at_epoch(state)
    model.eval()
    optimizer.zero_grad()
    return state


@torch.no_grad()
def test_losses(model: Classifier, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Of each test sample, and the accuracy."""
    logits = model(**batch)["logits"]
    accuracy = (logits.argmax(1) == batch["labels"]).float().mean()
    return cross_entropy(logits, batch["labels"], reduction="none"), float(accuracy)


def retrained(task: Task, options: argparse.Namespace, cache: Path) -> tuple[Tensor, Tensor]:
    """The halves `[subsets, train]` of zeros and ones, and the mean test losses after training on each.

    Each finished half is kept in the cache.
    """
    everything, test = task.batch(task.train), task.batch(task.test)
    size = len(task.train)
    halves = torch.zeros(options.subsets, size)
    losses = torch.zeros(options.subsets, len(task.test))
    for n in range(options.subsets):
        rows = torch.randperm(size, generator=torch.Generator().manual_seed(1000 + n))[: size // 2]
        halves[n, rows] = 1
        file = cache / f"half-{n}.pt"
        if not file.exists():
            runs = [train(task, everything, rows, 10_000 + 100 * n + r).model for r in range(options.repeats)]
            torch.save(torch.stack([test_losses(model, test)[0] for model in runs]), file)
        losses[n] = torch.load(file).mean(0)
    return halves, losses


# ---- the score


def ranks(values: Tensor) -> Tensor:
    return values.argsort(0).argsort(0).double()


def rank_correlations(predicted: Tensor, losses: Tensor) -> Tensor:
    """Spearman over the halves `[subsets, tests]`, of each test sample."""
    centred = [values - values.mean(0) for values in (ranks(predicted), ranks(-losses))]
    return (centred[0] * centred[1]).sum(0) / (centred[0].norm(dim=0) * centred[1].norm(dim=0))


@dataclass
class Judge:
    """Turns scores `[tests, train]` into an LDS.

    Attributes:
        halves: `[subsets, train]`.
        losses: `[subsets, tests]`.
    """

    halves: Tensor
    losses: Tensor

    def each(self, scores: Tensor) -> Tensor:
        return rank_correlations(self.halves.double() @ scores.double().T, self.losses)

    def held_out(self, scores: Tensor) -> float:
        """Mean over the samples on which damping is chosen."""
        return float(self.each(scores)[: self.losses.shape[1] // 2].mean())

    def reported(self, scores: Tensor) -> str:
        """Mean over the other samples, and its standard error over draws of halves and of samples."""
        tests = slice(self.losses.shape[1] // 2, None)
        predicted, losses = (self.halves.double() @ scores.double().T)[:, tests], self.losses[:, tests]
        draw, values = torch.Generator().manual_seed(0), []
        for _ in range(BOOTSTRAPS):
            # Without ties, which drawn copies would be: half of the halves each time.
            chosen = torch.randperm(len(losses), generator=draw)[: len(losses) // 2]
            samples = torch.randint(losses.shape[1], (losses.shape[1],), generator=draw)
            values.append(rank_correlations(predicted[chosen][:, samples], losses[chosen][:, samples]).mean())
        mean = float(rank_correlations(predicted, losses).mean())
        return f"{mean:.3f} ± {float(torch.stack(values).std()):.3f}"


# ---- attributions


@dataclass
class Scores:
    """By metric and preconditioner, scores `[tests, train]`; of the Fisher matrix by damping."""

    plain: dict[tuple[str, str | None], Tensor]
    damped: dict[str, dict[float, Tensor]]

    def row(self, judge: Judge) -> list[str]:
        cells = []
        for precondition in (None, "fisher", "adam"):
            for metric in ("dot", "cosine"):
                if precondition == "fisher":
                    tried = self.damped[metric]
                    best = max(tried, key=lambda damping: judge.held_out(tried[damping]))
                    cells.append(f"{judge.reported(tried[best])} (λ {best:g})")
                else:
                    cells.append(judge.reported(self.plain[metric, precondition]))
        return cells


def search_scores(target: Any, queries: Any, adam_queries: Any, tests: int) -> Scores:
    """All scores, by the search of a store or an ensemble."""

    def scores(queries: Any, metric: str, precondition: str | None, damping: float = 0.1) -> Tensor:
        hits = target.search(
            queries, k=len(target), metric=metric, precondition=precondition, damping=damping, progress=False
        ).with_format("torch")
        found = torch.empty(tests, len(target))
        query = torch.arange(tests).repeat_interleave(len(target))
        found[query, hits["row"][:]] = hits["score"][:].float()
        return found

    plain, damped = {}, {}
    share = (target.stores[0].dim if hasattr(target, "stores") else target.dim) / 1024
    for metric in ("dot", "cosine"):
        plain[metric, None] = scores(queries, metric, None)
        plain[metric, "adam"] = scores(adam_queries, metric, None)
        damped[metric] = {damping: scores(queries, metric, "fisher", damping * share) for damping in DAMPINGS}
    return Scores(plain, damped)


def matrix_scores(train: Tensor, tests: Tensor, adam_tests: Tensor) -> Scores:
    """The same of gradients in memory, by their inner products: q (G'G/N + λ)^-1 G' = N q G' (G G' + λ N)^-1."""
    train, tests, adam_tests = train.double(), tests.double(), adam_tests.double()
    gram, cross = train @ train.T, tests @ train.T
    plain: dict[tuple[str, str | None], Tensor] = {("dot", None): cross, ("dot", "adam"): adam_tests @ train.T}
    for precondition in (None, "adam"):
        plain["cosine", precondition] = plain["dot", precondition] / train.norm(dim=1)
    damped: dict[str, dict[float, Tensor]] = {"dot": {}, "cosine": {}}
    size = len(train)
    for damping in DAMPINGS:
        # The mean eigenvalue that 1,024 numbers would have.
        added = damping * gram.trace() / 1024 * torch.eye(size)
        inverse = torch.linalg.inv(gram + added)
        damped["dot"][damping] = size * cross @ inverse
        damped["cosine"][damping] = damped["dot"][damping] / (size * gram @ inverse).diagonal().sqrt()
    return Scores(plain, damped)


class Attribution:
    """Scores from gradients of one or several trained models."""

    def __init__(self, task: Task, folder: Path):
        self.task, self.folder, self.stores = task, folder, 0

    def projected(self, trained: list[Trained], dim: int) -> Scores:
        """By GradProj as it comes, one store for each model."""
        found = [self._store(each, dim) for each in trained]
        stores, queries, adam_queries = zip(*found, strict=True)
        tests = len(self.task.test)
        if len(stores) == 1:
            return search_scores(stores[0], queries[0], adam_queries[0], tests)
        rates = [each.learning_rate for each in trained]
        ensemble = GradientEnsemble(stores, weights=[rate / sum(rates) for rate in rates])
        return search_scores(ensemble, list(queries), list(adam_queries), tests)

    def _store(self, trained: Trained, dim: int) -> tuple[GradientStore, Tensor, Tensor]:
        projector = GradProjector(trained.model, proj_rank_total=dim, optimizer_state=trained.optimizer)
        self.stores += 1
        store = projector.project(self.task.train, output_dir=self.folder / str(self.stores), batch_size=32)
        return store, *self._queries(projector)

    def _queries(self, projector: GradProjector) -> tuple[Tensor, Tensor]:
        return tuple(projector.gradients(self.task.test, adam, batch_size=32) for adam in (False, True))  # type: ignore

    def exact(self, trained: Trained) -> tuple[Tensor, Tensor, Tensor]:
        """Whole gradients of the same layers: of training rows, test rows, and Adam's step along the latter."""
        options: dict[str, Any] = {"stages": 1, "rank": (None, None), "optimizer_state": trained.optimizer}
        projector = GradProjector(trained.model, **options)
        return projector.gradients(self.task.train, batch_size=32), *self._queries(projector)


def dense_projection(parts: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Gaussian random projection of whole gradients, made chunk by chunk."""
    draw, found = torch.Generator().manual_seed(0), [torch.zeros(len(part), dim) for part in parts]
    for start in range(0, parts[0].shape[1], 4096):
        columns = [part[:, start : start + 4096] for part in parts]
        matrix = torch.randn(columns[0].shape[1], dim, generator=draw) / dim**0.5
        for total, part in zip(found, columns, strict=True):
            total += part @ matrix
    return found


def feature_scores(task: Task) -> dict[str, Tensor]:
    """Cosines of mean token states, without a gradient; and with the sign of whether labels agree."""
    means = []
    for rows in (task.test, task.train):
        batch = task.batch(rows)
        mask = batch["attention_mask"][..., None]
        states = embedding(batch["input_ids"], task.states) * mask
        means.append(normalize(states.sum(1) / mask.sum(1), dim=1))
    cosines = means[0] @ means[1].T
    labels = [torch.tensor(rows["labels"]) * 2 - 1 for rows in (task.test, task.train)]
    agree = labels[0][:, None] * labels[1]
    return {"token states, cosine": cosines, "token states, cosine, minus if labels differ": cosines * agree}


def traker_scores(task: Task, models: list[Classifier], damping: float) -> Tensor:
    """TRAK by its own package; its own default is no damping."""
    from trak import TRAKer
    from trak.modelout_functions import TextClassificationModelOutput
    from trak.projectors import BasicProjector, ProjectionType
    from trak.score_computers import BasicScoreComputer

    class Damped(BasicScoreComputer):
        def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
            self.lambda_reg = damping * float(xtx.trace()) / 1024
            return super().get_x_xtx_inv(grads, xtx)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = Classifier(task.states)

        def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.classifier(input_ids, attention_mask)["logits"]

    def batches(rows: Dataset) -> list[list[Tensor]]:
        whole = task.batch(rows)
        ids, mask = whole["input_ids"], whole["attention_mask"]
        return list(zip(*[x.split(50) for x in (ids, torch.zeros_like(ids), mask, whole["labels"])], strict=True))

    model = Logits()
    names = [f"classifier.{layer.name}.{p}" for layer in GradProjector(models[0]).layers for p in layer.parameters]
    wanted = {name: p for name, p in model.named_parameters() if name in names}
    projector = BasicProjector(
        grad_dim=sum(p.numel() for p in wanted.values()), proj_dim=TRAK_DIM, seed=0, proj_type=ProjectionType.normal,
        device="cpu",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model, TextClassificationModelOutput(), len(task.train), folder, device="cpu", projector=projector,
            proj_dim=TRAK_DIM, use_half_precision=False, grad_wrt=list(wanted), logging_level=40,
            score_computer=Damped,
        )  # fmt: skip
        states = [{f"classifier.{name}": p for name, p in each.state_dict().items()} for each in models]
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for batch in batches(task.train):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for number, state in enumerate(states):
            traker.start_scoring_checkpoint("test", state, model_id=number, num_targets=len(task.test))
            for batch in batches(task.test):
                traker.score(batch, num_samples=len(batch[0]))
        return torch.as_tensor(traker.finalize_scores("test")).T.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with columns 'text' and 'score'")
    parser.add_argument("--model", help="language model, default SmolLM2-135M-Instruct of the demo extra")
    parser.add_argument("--train_rows", type=int, default=500)
    parser.add_argument("--test_rows", type=int, default=200)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each half, with other seeds")
    parser.add_argument("--models", type=int, default=5, help="of an ensemble, trained on all rows")
    parser.add_argument("--traker", action="store_true", help="also TRAK by its own package")
    parser.add_argument("--cache", type=Path, help="folder to keep finished trainings in, default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary) / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        print(report(options, cache, Path(temporary)), end="\n\n")
    print(environment())


def report(options: argparse.Namespace, cache: Path, folder: Path) -> str:
    file = cache / "task.pt"
    if not file.exists():
        task = make_task(options)
        torch.save((task.states, task.train.to_list(), task.test.to_list()), file)
    states, *rows = torch.load(file)
    task = Task(states, *map(Dataset.from_list, rows))
    start = time.process_time()
    judge = Judge(*retrained(task, options, cache))
    seconds = time.process_time() - start
    everything, test, every_row = task.batch(task.train), task.batch(task.test), torch.arange(len(task.train))
    models = [train(task, everything, every_row, seed) for seed in range(options.models)]
    losses, accuracies = zip(*[test_losses(each.model, test) for each in models], strict=True)
    epochs: list[Trained] = []
    train(task, everything, every_row, 0, lambda state: epochs.append(frozen_copy(task, state)))

    attribution = Attribution(task, folder)
    exact = attribution.exact(models[0])
    found = {"exact gradients": matrix_scores(*exact)}
    for dim in DIMS:
        found[f"dense random projection, k={dim:,}"] = matrix_scores(*dense_projection(exact, dim))
        found[f"**GradProj, k={dim:,}**"] = attribution.projected(models[:1], dim)
    found[f"**GradProj, k=1,024, {EPOCHS} checkpoints of one run**"] = attribution.projected(epochs, 1024)
    found[f"**GradProj, k=1,024, {options.models} models**"] = attribution.projected(models, 1024)
    lines = [[name, *scores.row(judge)] for name, scores in found.items()]
    others = feature_scores(task)
    if options.traker:
        for count in sorted({1, options.models}):
            name = f"TRAK (traker, k={TRAK_DIM}), {count} model{'s' * (count > 1)}"
            chosen = [each.model for each in models[:count]]
            tried = {damping: traker_scores(task, chosen, damping) for damping in (0.0, *DAMPINGS)}
            best = max(tried, key=lambda damping: judge.held_out(tried[damping]))
            others[f"{name}, as it comes"] = tried[0.0]
            others[f"{name}, damped (λ {best:g})"] = tried[best]
    headers = ["attribution", "dot", "cosine", "fisher, dot", "fisher, cosine", "adam, dot", "adam, cosine"]
    weights = sum(p.numel() for layer in GradProjector(models[0].model).layers for p in layer.parameters.values())
    facts = (
        f"{len(task.train)} training rows, {options.subsets} halves x {options.repeats} trainings ({seconds:.0f} "
        f"CPU seconds, less where the cache had them), {len(task.test)} test samples, the second half is reported; "
        f"{weights:,} weights; test accuracy {sum(accuracies) / len(accuracies):.3f}, loss "
        f"{float(torch.stack(losses).mean()):.3f} on all rows, {float(judge.losses.mean()):.3f} on halves"
    )
    tables = [markdown_table(headers, lines)]
    tables.append(markdown_table(["other", "LDS"], [[name, judge.reported(s)] for name, s in others.items()]))
    return "\n\n".join([facts, *tables])


def frozen_copy(task: Task, state: Trained) -> Trained:
    """The model and its optimizer's moments as they are now."""
    model = Classifier(task.states)
    model.load_state_dict(state.model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    optimizer.load_state_dict(state.optimizer.state_dict())
    return Trained(model.eval(), optimizer, state.learning_rate)


if __name__ == "__main__":
    main()
