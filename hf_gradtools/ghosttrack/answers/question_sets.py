"""Detection data sets by task: a model's own answers to questions, and true and false claims."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.core.atomic import atomic_write, rename_unless_there


if TYPE_CHECKING:
    from datasets import Dataset


__all__ = ["TASKS", "QuestionSet", "Task"]


@dataclass(frozen=True)
class Task:
    """Where a task's rows are on the Hub, and how they become labelled answers."""

    dataset: str | None
    split: str
    kind: str  # "answers", "choices" or "claims"


TASKS: Mapping[str, Task] = {
    "triviaqa": Task("mandarjoshi/trivia_qa:rc.nocontext", "validation", "answers"),
    "nq": Task("google-research-datasets/nq_open", "validation", "answers"),
    "qa": Task(None, "train", "answers"),
    "arc": Task("allenai/ai2_arc:ARC-Easy", "test", "choices"),
    "mmlu": Task("cais/mmlu:all", "validation", "choices"),
    "claims": Task(None, "train", "claims"),
}


@dataclass(frozen=True)
class QuestionSet:
    """What a detection data set is made from.

    Args:
        task (`str`): `"triviaqa"`, `"nq"`, or `"qa"` for other questions with answers: the model's own answers,
            labelled by whether they match, with those that are the same in one group; `"arc"`, `"mmlu"`: a true and a
            false option of each question; `"claims"`: claims with the labels they have.
        dataset (`str`, *optional*): Hub id, file or folder; by default the task's.
        split (`str`, *optional*): of a Hub id; by default the task's.
        model (`str`, *optional*): Hub id or folder of the causal LM that answers.
        limit (`int`, *optional*): questions at most, drawn at random.
        batch_size (`int`, defaults to 64): questions at a time.
        max_new_tokens (`int`, defaults to 24): of an answer.
        wrong_per_right (`float`, *optional*): wrong answers kept for each right one, defaults to 2; `None` keeps all.
        samples (`int`, defaults to 0): other answers to each question, for semantic entropy.
        claim_column, label_column (`str`): of `"claims"`.
        true_values (`Sequence[str]`): labels that mean true, as texts.
        seed (`int`, defaults to 0): of all draws.

    Raises:
        ValueError: the task is unknown, or lacks a data set or a model.
    """

    task: str
    dataset: str | None = None
    split: str | None = None
    model: str | None = None
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int = 24
    wrong_per_right: float | None = 2.0
    samples: int = 0
    claim_column: str = "claim"
    label_column: str = "label"
    true_values: Sequence[str] = field(default=("true", "True", "0"))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown. Pass one of {', '.join(TASKS)}.")
        if self.dataset is None and TASKS[self.task].dataset is None:
            raise ValueError(f"task={self.task!r} has no data set of its own. Pass dataset='rows.jsonl', or a Hub id.")
        if TASKS[self.task].kind == "answers" and self.model is None:
            raise ValueError(f"task={self.task!r} needs a model that answers. Pass model=, a Hub id or folder.")

    def make(self, output: str | os.PathLike[str]) -> Dataset:
        """Makes the data set and writes it; a killed call goes on where it was.

        Args:
            output (`str` or `os.PathLike`): a `.jsonl` file, or a folder for `load_from_disk`. Answers in progress go
                to `<output>.parts`.

        Raises:
            ValueError: `output` exists, or the rows have another form.
        """
        output = Path(output)
        if output.exists():
            raise ValueError(f"output={str(output)!r} exists. Pass another file or folder, or delete it.")
        output.parent.mkdir(parents=True, exist_ok=True)
        rows = getattr(self, f"_{TASKS[self.task].kind}")(output.with_name(output.name + ".parts"))
        _write(rows, output)
        return rows

    @property
    def _source(self) -> tuple[str, str | None]:
        if self.dataset is not None:
            return self.dataset, self.split
        task = TASKS[self.task]
        return str(task.dataset), self.split or task.split

    def _answers(self, parts: Path) -> Dataset:
        from hf_gradtools.ghosttrack.answers.answering import (
            balance,
            generate_answers,
            group_by_answer,
            sample_answers,
        )
        from hf_gradtools.ghosttrack.answers.questions import read_questions
        from hf_gradtools.ghosttrack.phases.common import open_model

        questions = read_questions(*self._source, limit=self.limit, seed=self.seed)
        model, tokenizer = open_model(str(self.model))
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        rows = generate_answers(model, tokenizer, questions, parts / "answers", batch_size=self.batch_size, **options)
        if not len(rows):
            raise ValueError(
                f"model={self.model!r} answered none of {len(questions)} questions. Pass another model, or more "
                "max_new_tokens."
            )
        if self.wrong_per_right is not None:
            rows = balance(rows, self.wrong_per_right, self.seed)
        if self.samples:
            size = max(1, self.batch_size // self.samples)
            more: dict[str, Any] = {"num_samples": self.samples, "batch_size": size, "seed": self.seed}
            rows = sample_answers(model, tokenizer, rows, parts / "samples", **more, **options)
        return group_by_answer(rows)

    def _choices(self, parts: Path) -> Dataset:
        from hf_gradtools.ghosttrack.answers.claims import multiple_choice_claims

        return multiple_choice_claims(*self._source, limit=self.limit, seed=self.seed)

    def _claims(self, parts: Path) -> Dataset:
        from hf_gradtools.ghosttrack.answers.claims import plain_claims
        from hf_gradtools.workflow.data import load_rows

        source = load_rows(*self._source)
        if self.label_column in source.column_names:
            seen = set(source[self.label_column][:])
            true = [value for value in seen if str(value) in self.true_values]
        else:
            true = []  # plain_claims names the columns there are
        rows = plain_claims(
            source,
            claim_column=self.claim_column,
            label_column=self.label_column,
            true_values=true,
            seed=self.seed,
        )
        return rows if self.limit is None else rows.shuffle(self.seed).select(range(min(self.limit, len(rows))))


def _write(rows: Dataset, output: Path) -> None:
    """A file or a folder, whole or not at all."""
    if output.suffix == ".jsonl":
        with atomic_write(output) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
        return
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as unfinished:
        folder = Path(unfinished) / output.name
        rows.save_to_disk(folder)
        rename_unless_there(folder, output)
