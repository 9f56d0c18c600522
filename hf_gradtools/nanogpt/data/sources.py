"""Texts to prepare, in pieces small enough for memory: files, and rows of datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm.auto import tqdm


__all__ = ["Piece", "RowSource", "Source", "TextFile", "open_sources"]

ROW_FILES = (".jsonl", ".json", ".csv", ".parquet")
PIECE_CHARACTERS = 1 << 18
LONGEST_PIECE = 16  # times as many, where no line ends
BATCH_ROWS = 1000
BATCH_PIECES = 8


@dataclass(frozen=True)
class Piece:
    """Some text, and where it stands.

    Attributes:
        text: the text.
        source: name of the file or dataset.
        unit: what `number` counts, "line" or "row".
        number: of the line or row on which the text begins.
        ends: whether a document ends here.
    """

    text: str
    source: str
    unit: str
    number: int
    ends: bool

    def locate(self, position: int) -> str:
        """Where a character of `text` stands."""
        number = self.number + (self.text.count("\n", 0, position) if self.unit == "line" else 0)
        return f"{self.unit} {number} of {self.source}"


@dataclass(frozen=True)
class TextFile:
    """A file of UTF-8 text, one document.

    Args:
        path: the file.
        any_bytes: read what is not UTF-8 as surrogates, which encode to the same bytes again.
    """

    path: Path
    any_bytes: bool = False

    def batches(self, doing: str) -> Iterator[list[Piece]]:
        """All pieces in order, some at a time, under a progress bar."""
        size = self.path.stat().st_size
        errors = "surrogateescape" if self.any_bytes else "strict"
        with (
            open(self.path, encoding="utf-8", errors=errors, newline="") as file,
            tqdm(total=size, unit="B", unit_scale=True, desc=f"{doing} {self.path.name}", delay=2) as bar,
        ):
            batch: list[Piece] = []
            for piece in self._pieces(file):
                batch.append(piece)
                if len(batch) == BATCH_PIECES:
                    yield batch
                    batch = []
                    bar.update(file.buffer.tell() - bar.n)
            yield batch
            bar.update(size - bar.n)

    def _pieces(self, file: TextIO) -> Iterator[Piece]:
        text, line = "", 1
        while read := self._read(file, line):
            text += read
            cut = _last_cut(text)
            if cut == 0 and len(text) >= LONGEST_PIECE * PIECE_CHARACTERS:
                cut = len(text)  # no line ends in it
            if cut:
                yield Piece(text[:cut], str(self.path), "line", line, ends=False)
                line += text.count("\n", 0, cut)
                text = text[cut:]
        yield Piece(text, str(self.path), "line", line, ends=True)

    def _read(self, file: TextIO, line: int) -> str:
        try:
            return file.read(PIECE_CHARACTERS)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is no UTF-8 text: byte 0x{error.object[error.start]:02X}, in or after line {line}. "
                "Convert it to UTF-8, or pass tokenizer='byte', which takes any file."
            ) from error


def _last_cut(text: str) -> int:
    """The last place where a text may be cut without changing how its parts are tokenized; 0 if there is none.

    That is after a line break between two words: tokenizers join runs of whitespace, and a word with what precedes it.
    Of the two characters of a CRLF some make one token at the end of a text and two before a word, which is let pass.
    """
    cut = len(text)
    while (cut := text.rfind("\n", 1, cut - 1) + 1) > 0:
        before = text[max(cut - 3, 0) : cut - 1].removesuffix("\r")
        if before and not before[-1].isspace() and not text[cut].isspace():
            return cut
    return 0


@dataclass(frozen=True)
class RowSource:
    """One text column of a dataset, each row a document."""

    name: str
    split: str | None = None
    text_column: str | None = None

    def batches(self, doing: str) -> Iterator[list[Piece]]:
        """All rows in order, some at a time, under a progress bar."""
        from hf_gradtools.workflow.data import load_rows

        rows = load_rows(self.name, self.split)
        column = _text_column(rows.column_names, self.text_column, self.name)
        number = 0
        with tqdm(total=len(rows), unit="row", desc=f"{doing} {self.name}", delay=2) as bar:
            for batch in rows.select_columns([column]).iter(BATCH_ROWS):
                texts = batch[column]
                pieces = [Piece(text, self.name, "row", number + i, True) for i, text in enumerate(texts)]
                if wrong := [piece for piece in pieces if not isinstance(piece.text, str)]:
                    raise ValueError(
                        f"column {column!r} has {wrong[0].text!r} in row {wrong[0].number} of {self.name}; "
                        "texts are needed. Drop such rows or pass another text_column."
                    )
                yield pieces
                number += len(texts)
                bar.update(len(texts))


def _text_column(columns: Sequence[str], named: str | None, source: str) -> str:
    if named is None and len(columns) == 1:
        return columns[0]
    column = named or next((name for name in ("text", "content") if name in columns), None)
    if column is None or column not in columns:
        asked = f"no column {named!r}" if named else "no column 'text' or 'content'"
        raise ValueError(f"dataset {source!r} has {asked}, but {', '.join(columns)}. Pass text_column=one of them.")
    return column


Source = TextFile | RowSource


def open_sources(
    inputs: str | Sequence[str], split: str | None = None, text_column: str | None = None, any_bytes: bool = False
) -> list[Source]:
    """Tells text files from datasets.

    Args:
        inputs: a file is text unless its ending is one of `.jsonl .json .csv .parquet`; these, folders and whatever is
            no file are read by `datasets`.
        split: of datasets.
        text_column: of datasets; default the only one, or "text" or "content".
        any_bytes: take text files that are not UTF-8.

    Raises:
        ValueError: there are no inputs, or a file is empty.
    """
    names = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    if not names:
        raise ValueError("inputs is empty. Pass a text file, or a dataset's id, file or folder.")
    sources: list[Source] = []
    for name in map(str, names):
        path = Path(name).expanduser()
        if path.is_file() and path.suffix not in ROW_FILES:
            if path.stat().st_size == 0:
                raise ValueError(f"{name} is an empty file. Pass one that has text.")
            sources.append(TextFile(path, any_bytes))
        elif not path.exists() and path.suffix == ".txt":
            raise ValueError(f"there is no file {name!r}. Pass a text file, or a dataset's id, file or folder.")
        else:
            sources.append(RowSource(name, split, text_column))
    return sources
