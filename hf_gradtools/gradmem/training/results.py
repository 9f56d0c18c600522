"""The file of figures that a run or an evaluation leaves, and what is read of it later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


__all__ = ["RESULTS", "label_of", "read_results"]

RESULTS = "results.json"  # in the folder of a run


def label_of(result: dict[str, Any]) -> str:
    """What a result is called in tables: "vanilla", or mode and steps of the write, such as "second, K=2"."""
    return "vanilla" if result["vanilla"] else f"{result['grad_mode']}, K={result['K']}"


def read_results(sources: list[str]) -> list[dict[str, Any]]:
    """The results in folders of runs, `.json` files, and `.jsonl` files of several.

    Raises:
        ValueError: there is none, or a file holds something else.
    """
    results: list[dict[str, Any]] = []
    for source in sources:
        path = Path(source)
        path = path / RESULTS if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
            found = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} cannot be read: {error}. Pass folders of runs, or files of results."
            ) from error
        found = found if isinstance(found, list) else [found]
        for result in found:
            if not isinstance(result, dict) or not {"vanilla", "task", "metrics"} <= result.keys():
                raise ValueError(f"{str(path)!r} holds no result of `gradmem train` or `gradmem eval`.")
        results += found
    return results
