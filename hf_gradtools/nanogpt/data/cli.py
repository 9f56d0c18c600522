"""`hf-gradtools nanogpt prepare`: text to token files."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import typer

from hf_gradtools.workflow.flags import parser_for
from hf_gradtools.workflow.terminal import one_line_errors, quiet


@dataclass
class PrepareOptions:
    """What to make token files of.

    Args:
        inputs: text files; or Hub ids, .jsonl .json .csv .parquet files and folders, as `datasets` reads them.
        out_dir: the folder to make, such as data/my_text.
        tokenizer: "char", "byte", or a Hub id or folder of a tokenizer.
        val_fraction: share of the tokens, the last ones, that goes to val.bin.
        val_inputs: texts for val.bin of its own, instead of val_fraction.
        split: of datasets; default train.
        text_column: of datasets; default the only one, or "text" or "content".
        separator: put after every row, and after each of several files; default the tokenizer's end of text.
        overwrite: replace the folder if there is one.
    """

    inputs: list[str]
    out_dir: str
    tokenizer: str = "char"
    val_fraction: float = 0.1
    val_inputs: list[str] | None = None
    split: str | None = None
    text_column: str | None = None
    separator: str | None = None
    overwrite: bool = False


def main(argv: list[str] | None = None) -> None:
    """Makes a folder of train.bin, val.bin, meta.json and the tokenizer.

    Args:
        argv (`list[str]`, *optional*): the words after the command; default `sys.argv`'s.
    """
    parser = parser_for(
        PrepareOptions, prog="hf-gradtools nanogpt prepare", description="Make token files to train on."
    )
    (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    try:
        with one_line_errors(PrepareOptions):
            quiet()
            from hf_gradtools.nanogpt.data.prepare import prepare

            made = prepare(**asdict(options))
            counts = f"{made.meta['train_tokens']:,} tokens for training, {made.meta['val_tokens']:,} for validation"
            typer.echo(f"{options.out_dir}: {counts}, {made.vocab_size:,} ids, {made.dtype.name}")
    except typer.Exit as ended:  # outside of a typer app nothing else would catch it
        raise SystemExit(ended.exit_code) from ended


if __name__ == "__main__":
    main()
