"""Labelled answers as the phases read them: what columns there must be, checked before anything is computed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from hf_gradtools.ghosttrack.labels import check_labels
from hf_gradtools.workflow.data import load_rows


__all__ = ["NEEDED", "DetectionRows"]

NEEDED = ("text", "answer_start", "label", "group")


@dataclass(frozen=True, eq=False)
class DetectionRows:
    """A detection data set of T rows.

    Attributes:
        name (`str`): for messages and folders.
        rows (`datasets.Dataset`): `text`, `answer_start`, `label` (1 = hallucinated), `group` (of a question), and
            others where there are any.
    """

    name: str
    rows: Dataset

    @classmethod
    def load(cls, name: str, source: str | Dataset, split: str | None = None) -> DetectionRows:
        """Reads and checks a data set.

        Args:
            name (`str`): of it.
            source (`str` or `datasets.Dataset`): rows, or what `load_rows` takes.
            split (`str`, *optional*): of a Hub id.

        Raises:
            ValueError: a column is missing, a text is empty, or all labels are alike.
        """
        rows = source if isinstance(source, Dataset) else load_rows(source, split)
        if missing := [column for column in NEEDED if column not in rows.column_names]:
            raise ValueError(
                f"detection data set {name!r} has no column {missing[0]!r}; it has {', '.join(rows.column_names)}. "
                f"Need {', '.join(NEEDED)}, as `hf-gradtools ghosttrack questions` makes them."
            )
        try:
            check_labels(rows["label"][:], "label")
        except ValueError as error:
            raise ValueError(f"detection data set {name!r}: {error}") from error
        for row, (text, start) in enumerate(zip(rows["text"], rows["answer_start"], strict=True)):
            if not text or not text[start:].strip():
                raise ValueError(
                    f"detection data set {name!r} has no answer in row {row}: {str(text)[-60:]!r} from "
                    f"answer_start={start} on. Leave the row out."
                )
        return cls(name, rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """Prompts with their answers."""
        return list(self.rows["text"])

    @property
    def answer_starts(self) -> list[int]:
        """Where the answers begin."""
        return list(self.rows["answer_start"])

    @property
    def prompt_template(self) -> str | None:
        """What every row's question and answer were put into, as `"Question: {question}\\nAnswer: {answer}"`.

        `None` if rows differ in it, or do not have a `question`.
        """
        if "question" not in self.rows.column_names:
            return None
        templates = set()
        for text, start, question in zip(self.texts, self.answer_starts, self.rows["question"], strict=True):
            before, found, between = text[:start].rpartition(str(question).strip())
            templates.add(f"{before}{{question}}{between}{{answer}}" if found else None)
            if len(templates) > 1:
                return None
        template = templates.pop()
        is_usable = template is not None and template.count("{question}") == template.count("{answer}") == 1
        return template if is_usable else None

    @property
    def labels(self) -> np.ndarray:
        """`[T]` int64: 1 = hallucinated."""
        return np.asarray(self.rows["label"][:], np.int64)

    @property
    def groups(self) -> np.ndarray:
        """`[T]`: rows of one question have the same."""
        return np.asarray(self.rows["group"][:])

    @property
    def categories(self) -> np.ndarray | None:
        """`[T]`, where there are any."""
        return np.asarray(self.rows["category"][:]) if "category" in self.rows.column_names else None

    def column(self, name: str, default: Any = None) -> list[Any]:
        """A column that may be missing."""
        return list(self.rows[name]) if name in self.rows.column_names else [default] * len(self)

    def digest(self) -> str:
        """Of what the results depend on."""
        digest = hashlib.sha256()
        for row in self.rows.select_columns(list(NEEDED)):
            digest.update(json.dumps([row[name] for name in NEEDED]).encode())
        return digest.hexdigest()
