"""What `hf-gradtools ghost project` left in a folder, opened again and searched."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_gradtools.core.store import MANIFEST
from hf_gradtools.ghost.gradproj.ensemble import GradientEnsemble
from hf_gradtools.ghost.gradproj.projector import GradProjector
from hf_gradtools.ghost.gradproj.run import CHECKPOINTS, TEXTS, load_projector
from hf_gradtools.ghost.gradproj.run_config import ProjectConfig, SearchConfig
from hf_gradtools.ghost.gradproj.search import Searchable
from hf_gradtools.ghost.gradproj.store import GradientStore
from hf_gradtools.workflow.causal_lm import load_tokenizer
from hf_gradtools.workflow.data import SAMPLE_ID, load_rows, number_rows, read_texts
from hf_gradtools.workflow.run import OPTIONS, tokenize
from hf_gradtools.workflow.tokenizing import RowFormat, tokenize_rows


__all__ = ["Answer", "Hit", "StoredProjections", "open_stores"]


@dataclass
class Hit:
    """A sample near a query.

    Attributes:
        sample_id: its id.
        score: as searched.
        text: of it, where known.
        layers: each layer's part of the inner product of its gradient with the query's, where known.
    """

    sample_id: int | str
    score: float
    text: str | None
    layers: dict[str, float] = field(default_factory=dict)


@dataclass
class Answer:
    """The samples nearest to a query, best first.

    Attributes:
        query: its text.
        hits: the samples.
    """

    query: str
    hits: list[Hit]


class StoredProjections:
    """The gradients, options and texts in the output folder of a run.

    Args:
        output_dir: of the run.
        model: in the place of the one that was projected, when it has moved.

    Raises:
        ValueError: the folder holds no run, or no gradients yet.
    """

    def __init__(self, output_dir: str | os.PathLike[str], model: str | None = None):
        self.folder = Path(output_dir)
        if not (self.folder / OPTIONS).exists():
            raise ValueError(
                f"output_dir={str(self.folder)!r} holds no run of `ghost project`. Pass the output_dir of one."
            )
        self.stores = open_stores(self.folder)
        options = json.loads((self.folder / OPTIONS).read_bytes())
        self.config = ProjectConfig(**{**options, "output_dir": str(self.folder), "on_uncovered": "ignore"})
        self.model = model or self.config.model
        row_format = self.stores[0].extra["row_format"]
        self.row_format = RowFormat(**{**row_format, "prompt": tuple(row_format["prompt"])})
        self._optimizer_state: str | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._projector = lru_cache(maxsize=1)(self._load_projector)  # one model in memory at a time

    # ---- queries

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model)
        return self._tokenizer

    def query_rows(self, config: SearchConfig) -> Dataset:
        """The queries tokenized as the corpus was: all tokens of a text count, of prompt and response those of the
        response."""
        if config.query_dataset:
            rows = number_rows(load_rows(config.query_dataset, config.query_split))
            return tokenize(rows, f"query_dataset={config.query_dataset!r}", self.tokenizer, self.config)[0]
        if not config.query_response:
            return self._tokenize([{"text": text} for text in config.query], RowFormat(text="text"))
        row_format = self.row_format
        if row_format.text:
            raise ValueError(
                f"query_response={config.query_response[0]!r} has no use: the rows are plain text. Pass it within the "
                "query."
            )
        if row_format.messages:
            return self._tokenize(
                [
                    {row_format.messages: [{"role": "user", "content": q}, {"role": "assistant", "content": r}]}
                    for q, r in zip(config.query, config.query_response, strict=True)
                ],
                row_format,
            )
        prompt, response = row_format.prompt[0], row_format.response or ""
        pairs = zip(config.query, config.query_response, strict=True)
        return self._tokenize(
            [{prompt: q, response: r} for q, r in pairs], RowFormat(prompt=(prompt,), response=response)
        )

    def _tokenize(self, rows: Sequence[Mapping[str, Any]], row_format: RowFormat) -> Dataset:
        numbered = number_rows(Dataset.from_list(list(rows)))
        tokenized = tokenize_rows(numbered, self.tokenizer, row_format, self.config.max_length)
        if len(tokenized) < len(rows):
            lost = min(set(range(len(rows))) - set(tokenized[SAMPLE_ID]))
            raise ValueError(
                f"query number {lost + 1} has nothing that the loss counts within max_length={self.config.max_length} "
                "tokens, so it has no gradient. Pass a text of at least 2 tokens, and a shorter prompt."
            )
        return tokenized

    # ---- search

    @property
    def searchable(self) -> Searchable:
        """The store, or those of all checkpoints weighed by their learning rates; equally if one is not known."""
        if len(self.stores) == 1:
            return self.stores[0]
        return GradientEnsemble(self.stores, None if self.knows_learning_rates else [1 / len(self.stores)] * len(self))

    @property
    def knows_learning_rates(self) -> bool:
        """Whether checkpoints can be weighed."""
        rates = [store.extra.get("learning_rate") for store in self.stores]
        return None not in rates and sum(filter(None, rates)) > 0

    def __len__(self) -> int:
        return len(self.stores)

    def search(self, config: SearchConfig, queries: Dataset) -> list[Answer]:
        """The nearest samples of each query, or of all together if they are reduced.

        Raises:
            ValueError: the model is another one than was projected, or has no state of Adam.
        """
        self._optimizer_state = config.optimizer_state
        adam, target = config.precondition == "adam", self.searchable
        rows = queries.select_columns(["input_ids", "labels"])
        gradients = [
            self._projector(i, adam).gradients(rows, optimizer_aware=adam, batch_size=self.config.batch_size)
            for i in range(len(self))
        ]
        found = target.search(
            gradients if len(gradients) > 1 else gradients[0],
            k=min(config.top_k, len(target)),
            metric=config.metric,  # type: ignore[arg-type]
            precondition="fisher" if config.precondition == "fisher" else None,  # of adam the gradients are by now
            damping=config.damping,
            reduce=config.reduce,  # type: ignore[arg-type]
        )
        texts = queries["text"] if config.reduce is None else [_together(queries["text"], config.reduce)]
        answers = [Answer(text, []) for text in texts]
        known = read_texts(self.folder / TEXTS, set(found["sample_id"]))
        for hit in found:
            text = known.get(hit["sample_id"])
            answers[hit["query"]].hits.append(Hit(hit["sample_id"], hit["score"], text))
        return answers

    def add_layers(self, answers: Sequence[Answer], queries: Dataset, reduce: str | None = None) -> None:
        """Fills in the layers of all hits from their rows, which are read again from the dataset.

        Raises:
            ValueError: the dataset is gone, or is no longer the one that was projected.
        """
        texts = {hit.sample_id: hit.text or "" for answer in answers for hit in answer.hits}
        ids = list(texts)
        dots = self._layer_dots(queries, self._rows(texts))
        for number, answer in enumerate(answers):
            for hit in answer.hits:
                place = ids.index(hit.sample_id)
                columns = {name: dot[:, place] for name, dot in dots.items()}
                if reduce is None:
                    hit.layers = {name: float(column[number]) for name, column in columns.items()}
                else:
                    hit.layers = _reduced(columns, reduce)

    # ---- in words

    def figures(self, num_queries: int) -> dict[str, str]:
        """A few numbers about the run."""
        first = self.stores[0]
        checkpoints = {"checkpoints": f"{len(self)}"} if len(self) > 1 else {}
        return {
            "queries": f"{num_queries:,}",
            "samples searched": f"{len(first):,}",
            "numbers per sample": f"{first.dim:,}",
            "layers": f"{len(first.identity['layers']):,}",
            **checkpoints,
        }

    def settings(self, config: SearchConfig) -> dict[str, str]:
        """How the rows were projected and searched."""
        identity, weights = self.stores[0].identity, self.searchable.weights
        reading = {"Metric": config.metric, "Preconditioner": config.precondition}
        if config.precondition == "fisher":
            reading["Damping"] = f"{config.damping:g}"
        if len(self) > 1:
            source = "learning rates" if self.knows_learning_rates else "equal, as learning rates are not known"
            names = (store.path.name for store in self.stores)
            named = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(names, weights, strict=True))
            reading["Weights of checkpoints"] = f"{named} ({source})"
        return {
            **reading,
            "Dataset": f"{self.config.dataset}{f', split {self.config.split}' * bool(self.config.split)}",
            "Rows": f"{self.row_format}, at most {self.config.max_length} tokens",
            "Projection": f"{identity['stages']} stages, rank {identity['rank']}, basis {identity['basis']}, "
            f"seed {identity['seed']}",
            "Weights": f"{identity['model_dtype']}, fingerprint {identity['weights']}",
            "Stored as": self.stores[0].dtype,
        }

    # ---- how

    def _layer_dots(self, queries: Dataset, rows: Dataset) -> dict[str, Tensor]:
        """`[Q, R]` by layer, over checkpoints by their weights."""
        columns, sums = ["input_ids", "labels"], dict[str, Tensor]()
        for i, weight in enumerate(self.searchable.weights):
            dots = self._projector(i, False).layer_dots(
                queries.select_columns(columns), rows.select_columns(columns), self.config.batch_size
            )
            for name, dot in dots.items():
                sums[name] = weight * dot + sums.get(name, 0.0)
        return sums

    def _rows(self, texts: Mapping[int | str, str]) -> Dataset:
        """The samples of these ids, whose texts begin like this, as they were projected."""
        dataset = f"dataset={self.config.dataset!r}"
        rows = number_rows(load_rows(self.config.dataset, self.config.split))
        places = {sample_id: place for place, sample_id in enumerate(rows[SAMPLE_ID])}
        if any(sample_id not in places for sample_id in texts):
            raise ValueError(f"{dataset} lacks samples that were projected from it.")
        chosen = rows.select([places[sample_id] for sample_id in texts])
        tokenized = tokenize(chosen, dataset, self.tokenizer, self.config)[0]
        if len(tokenized) < len(texts) or not all(map(str.startswith, tokenized["text"], texts.values())):
            raise ValueError(f"{dataset} has other rows than when it was projected.")
        return tokenized

    def _checkpoint(self, store: GradientStore) -> str | None:
        """The folder whose weights a store is of, `None` if it is the model itself."""
        name = store.extra.get("checkpoint")
        if name is None:
            return None
        path = self.folder / CHECKPOINTS
        folders = json.loads(path.read_bytes()) if path.exists() else {}
        if name not in folders or not Path(folders[name]).is_dir():
            raise ValueError(
                f"checkpoint {name!r} is not where {CHECKPOINTS} says: {folders.get(name)!r}. Restore it, or write "
                "there where it is now."
            )
        return str(folders[name])

    def _load_projector(self, number: int, optimizer_aware: bool) -> GradProjector:
        """The projector that made a store."""
        store = self.stores[number]
        checkpoint = self._checkpoint(store)
        state = (self._optimizer_state or checkpoint) if optimizer_aware else None
        if optimizer_aware and state is None:
            raise ValueError(
                "precondition='adam' needs Adam's second moments: pass optimizer_state=checkpoint-100, a folder of "
                "Trainer with optimizer.pt."
            )
        projector = load_projector(checkpoint or self.model, self.config, optimizer_state=state)
        projector.adopt(store.path)
        store.check_comparable(projector.identity(), "the model")
        return projector


def open_stores(folder: str | os.PathLike[str]) -> list[GradientStore]:
    """The stores of a run, those of checkpoints in order of steps; or the folder itself if it is a store.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    paths = [folder] if (folder / MANIFEST).exists() else [path.parent for path in folder.glob(f"*/{MANIFEST}")]
    if not paths:
        raise ValueError(f"output_dir={str(folder)!r} holds no gradients. Project some: hf-gradtools ghost project.")
    return sorted((GradientStore.open(path) for path in paths), key=lambda store: store.extra.get("step", 0))


def _reduced(columns: Mapping[str, Tensor], reduce: str) -> dict[str, float]:
    """Of all queries `[Q]` by layer: the mean, or those of the query with the largest sum."""
    if reduce == "mean":
        return {name: float(column.mean()) for name, column in columns.items()}
    best = int(torch.stack(list(columns.values())).sum(dim=0).argmax())
    return {name: float(column[best]) for name, column in columns.items()}


def _together(texts: Sequence[str], reduce: str) -> str:
    return f"{len(texts):,} queries together, by the {reduce} of their scores:\n\n" + "\n\n".join(texts)
