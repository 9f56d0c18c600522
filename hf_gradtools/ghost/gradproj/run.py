"""The workflow of `hf-gradtools ghost project`: a causal LM, a corpus, and the projected gradients of all its rows.

```python
run = prepare_projection(ProjectConfig(model="HuggingFaceTB/SmolLM2-135M", dataset="train.jsonl", output_dir="out"))
stores = run.project()
stores[0].search(queries, k=10)
```
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_gradtools.core.store import MANIFEST, write_json_atomically
from hf_gradtools.ghost.gradproj.projector import GradProjector
from hf_gradtools.ghost.gradproj.run_config import ProjectConfig
from hf_gradtools.ghost.gradproj.store import GradientStore
from hf_gradtools.ghost.models import load_any_model
from hf_gradtools.workflow.causal_lm import load_tokenizer
from hf_gradtools.workflow.data import load_rows, number_rows, write_texts
from hf_gradtools.workflow.run import OPTIONS, check_same_options, tokenize
from hf_gradtools.workflow.tokenizing import RowFormat


__all__ = ["ProjectionRun", "load_corpus", "load_projector", "logged_learning_rate", "prepare_projection"]

# Names in the folder of a run.
GRADIENTS, TEXTS = "gradients", "samples.jsonl"
CHECKPOINTS = "checkpoints.json"  # folders by name of the store, which itself holds no paths of a machine
STATE = "trainer_state.json"  # of a Trainer checkpoint


@dataclass
class ProjectionRun:
    """A run that is ready to start.

    Attributes:
        config: its options.
        samples: rows as tokenized, with their text.
        row_format: the columns they were made from.
        seconds: that `project` took for the rows it made.
        num_projected: these rows, those of all checkpoints added up.
    """

    config: ProjectConfig
    samples: Dataset
    row_format: RowFormat
    seconds: float = 0.0
    num_projected: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return bool(_process().is_main_process)

    def summary(self) -> str:
        """One line on each of model and rows."""
        config = self.config
        where = f", {len(config.checkpoint)} checkpoints" if config.checkpoint else ""
        return (
            f"model      {config.model}{where}\n"
            f"rows       {len(self.samples):,} of {config.dataset}: {self.row_format}"
        )

    def speed(self) -> str:
        """What `project` did, in words."""
        if not self.num_projected:
            return "nothing: all rows were there"
        rate = self.num_projected / self.seconds
        return f"{self.num_projected:,} rows in {self.seconds:,.0f} s, {rate:,.1f} per second"

    def warnings(self) -> list[str]:
        """What to know before searching."""
        unknown = [name for name, _, extra in self._sources() if name != GRADIENTS and "learning_rate" not in extra]
        if not unknown:
            return []
        return [f"no learning rate was logged up to {', '.join(unknown)}: all checkpoints will count equally"]

    def project(self) -> list[GradientStore]:
        """Writes options, texts and one store per checkpoint to the output folder; goes on where it was stopped.

        Raises:
            ValueError, StoreMismatchError: see [`GradProjector.project`].
        """
        folder, rows = Path(self.config.output_dir), self.samples.remove_columns("text")
        stores: list[GradientStore] = []
        for name, source, extra in self._sources():
            projector = load_projector(source, self.config)
            if not stores and self.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                write_json_atomically(folder / OPTIONS, self.config.identity())
                write_texts(self.samples, folder / TEXTS)
                self._write_checkpoints(folder / CHECKPOINTS)
            extra = {**extra, "row_format": asdict(self.row_format)}
            before, started = _num_rows(folder / name), time.perf_counter()
            store = projector.project(rows, None, folder / name, self.config.batch_size, extra=extra)
            self.num_projected += len(store) - before
            self.seconds += time.perf_counter() - started
            store.projector = None  # one model in memory at a time
            stores.append(store)
        return stores

    def _write_checkpoints(self, path: Path) -> None:
        folders = [Path(checkpoint).resolve() for checkpoint in self.config.checkpoint]
        before = json.loads(path.read_bytes()) if path.exists() else {}
        if folders:
            write_json_atomically(path, {**before, **{folder.name: str(folder) for folder in folders}})

    def _sources(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(name of the store, what to load, what to record) of the model, or of each checkpoint in order of steps."""
        if not self.config.checkpoint:
            return [(GRADIENTS, self.config.model, {})]
        found, since = [], 0
        for path in sorted(map(Path, self.config.checkpoint), key=_step):
            rate, step = logged_learning_rate(path, since), _step(path)
            found.append((path.resolve().name, str(path), _recorded(path, step, rate)))
            since = step
        return found


def prepare_projection(config: ProjectConfig) -> ProjectionRun:
    """Loads and tokenizes the rows. Writes no file, so that a mistake in the options leaves nothing behind.

    Raises:
        ValueError: an option does not fit the data, the model, or what is in the output folder.
    """
    if (Path(config.output_dir) / OPTIONS).exists():
        check_same_options(config)
    _check_checkpoints(config.checkpoint)
    samples, row_format = load_corpus(config, load_tokenizer(config.model))
    return ProjectionRun(config, samples, row_format)


def load_corpus(config: ProjectConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, RowFormat]:
    """The rows of a run, tokenized, with ids and texts, and the columns they were made from."""
    rows = number_rows(load_rows(config.dataset, config.split))
    return tokenize(rows, f"dataset={config.dataset!r}", tokenizer, config)


def load_projector(source: str, config: ProjectConfig, **more: Any) -> GradProjector:
    """The projector of a model or checkpoint with a run's options, on the accelerator if there is one."""
    model = load_any_model(source, config.dtype or "auto")
    if getattr(model, "quantization_method", None) is None:  # what is quantised is where it belongs
        model.to(_process().device)
    return GradProjector(model, config=config.projection(), **more)


def logged_learning_rate(checkpoint: Path, since: int = 0) -> float | None:
    """The mean learning rate that Trainer logged after step `since` up to a checkpoint, or the last one before; `None`
    if it logged none.

    Source: Xia et al., LESS, arXiv 2402.04333, eq. 3, weighs a checkpoint by the mean over its epoch.
    """
    state = json.loads((checkpoint / STATE).read_bytes())
    logged = [(log["step"], log["learning_rate"]) for log in state["log_history"] if "learning_rate" in log]
    if not logged:
        return None
    rates = [rate for step, rate in logged if step > since] or [logged[-1][1]]
    return float(sum(rates)) / len(rates)


def _process() -> PartialState:
    """This process, one of several under `accelerate launch` or `torchrun`, where each projects a part of the rows."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _check_checkpoints(paths: Sequence[str]) -> None:
    for path in paths:
        if not (Path(path) / STATE).exists():
            raise ValueError(f"checkpoint={path!r} has no {STATE}. Pass a folder that Trainer saved, checkpoint-100.")
    names = [Path(path).resolve().name for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"checkpoint={min(twice)!r} is the name of several folders. Each needs another name.")


def _num_rows(folder: Path) -> int:
    return len(GradientStore.open(folder)) if (folder / MANIFEST).exists() else 0


def _step(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / STATE).read_bytes())["global_step"])


def _recorded(checkpoint: Path, step: int, rate: float | None) -> dict[str, Any]:
    known = {"checkpoint": checkpoint.resolve().name, "step": step}
    return known if rate is None else {**known, "learning_rate": rate}
