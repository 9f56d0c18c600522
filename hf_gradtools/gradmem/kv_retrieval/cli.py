"""`hf-gradtools gradmem data`: a dataset of a task on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import typer

from hf_gradtools.gradmem.kv_retrieval.names import KVRetrievalConfig, parse_count
from hf_gradtools.workflow.flags import given_flags, parser_for
from hf_gradtools.workflow.terminal import one_line_errors


@dataclass
class DataOptions:
    """A dataset of key-value retrieval.

    Args:
        name: the task, such as "N10-K4V4-S4(32-64)" or "N8-K2V2-V62_1M".
        out: folder to write, with the tokenizer.
        num: rows for training, such as 500, 10K, 1M or 1_000_000; default the name's.
        valid_rows: rows for validation.
        seed: of all rows.
        num_proc: processes; the rows do not depend on it.
    """

    name: str
    out: str
    num: str | None = None
    valid_rows: str = "1K"
    seed: int = 0
    num_proc: int = 1


def main(argv: Sequence[str] | None = None) -> None:
    """Makes a dataset from the words of a command line."""
    with one_line_errors(DataOptions):
        parser = parser_for(DataOptions, prog="hf-gradtools gradmem data", description="Make a dataset on disk.")
        options = DataOptions(**given_flags(parser, argv))
        config = KVRetrievalConfig.from_name(options.name)
        num = None if options.num is None else parse_count(options.num, "num")
        valid_rows = parse_count(options.valid_rows, "valid_rows")
        from hf_gradtools.gradmem.kv_retrieval.dataset import save_kv_datasets

        splits = save_kv_datasets(config, options.out, num, valid_rows, options.seed, options.num_proc)
        sizes = ", ".join(f"{len(rows):,} rows of {split}" for split, rows in splits.items())
        typer.echo(f"{config.with_size(None).name}: {sizes} and the tokenizer in {options.out}")
