"""`hf-gradtools ghost`: scores training samples from the shell."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_gradtools.ghost.train_config import GhostTrainConfig


if TYPE_CHECKING:
    from hf_gradtools.ghost.stored_run import StoredRun


app = typer.Typer(
    help="Tell which training samples help or hurt a validation set, while a model trains.", no_args_is_help=True
)

LISTED = 5  # samples of each kind
Default = GhostTrainConfig


def _option(help: str, panel: str, *flags: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


@app.command(no_args_is_help=True)
def train(
    context: typer.Context,
    model: Annotated[str, _option("Causal LM: Hub id or folder.", "Data")],
    dataset: Annotated[
        str, _option("Training rows: Hub id (or id:config), .jsonl .json .csv .parquet .txt, saved folder.", "Data")
    ],
    output_dir: Annotated[str, _option("Folder of everything the run writes.", "Data")],
    split: Annotated[str | None, _option("Split of the dataset, such as train or train\\[:1000].", "Data")] = None,
    val: Annotated[
        list[str],
        _option(
            "Validation rows: like --dataset, or how many training rows to hold out, or their share. "
            "Several sets: --val name=rows, repeated.",
            "Data",
        ),
    ] = [Default.val],  # noqa: B006 - typer copies it
    val_split: Annotated[str | None, _option("Split of a validation dataset.", "Data")] = None,
    text_column: Annotated[str | None, _option("Column to train on; default by the usual names.", "Data")] = None,
    prompt_column: Annotated[str | None, _option("Prompt column; several: a,b.", "Data")] = None,
    response_column: Annotated[str | None, _option("Response column, all that the loss counts.", "Data")] = None,
    max_length: Annotated[int, _option("Tokens kept of each row.", "Data")] = Default.max_length,
    lora: Annotated[
        bool, _option("Train adapters on all linear layers, or all weights.", "Training", "--lora/--full")
    ] = Default.lora,
    lora_rank: Annotated[int, _option("Rank of the adapters.", "Training")] = Default.lora_rank,
    epochs: Annotated[float, _option("Passes over the training rows.", "Training")] = Default.epochs,
    max_steps: Annotated[int, _option("Optimizer steps, instead of --epochs.", "Training")] = Default.max_steps,
    batch_size: Annotated[int, _option("Rows in one forward.", "Training")] = Default.batch_size,
    gradient_accumulation_steps: Annotated[
        int, _option("Forwards in one step.", "Training")
    ] = Default.gradient_accumulation_steps,
    learning_rate: Annotated[
        float | None, _option("Peak learning rate; default 2e-4 for --lora, 2e-5 for --full.", "Training")
    ] = None,
    seed: Annotated[int, _option("Of adapters, data order and rows held out.", "Training")] = Default.seed,
    dtype: Annotated[
        str | None,
        _option("Type of the weights; default the checkpoint's for --lora, float32 for --full.", "Training"),
    ] = None,
    bf16: Annotated[bool, _option("Compute in bfloat16.", "Training", "--bf16")] = Default.bf16,
    save_steps: Annotated[int, _option("Steps between checkpoints.", "Training")] = Default.save_steps,
    report_to: Annotated[str, _option("Where to log, such as tensorboard.", "Training")] = Default.report_to,
    resume: Annotated[bool, _option("Continue the run in --output-dir.", "Training", "--resume")] = Default.resume,
    val_batch_size: Annotated[
        int, _option("Validation rows behind the score of a step.", "Scoring")
    ] = Default.val_batch_size,
    every_steps: Annotated[int, _option("Score every so many steps.", "Scoring")] = Default.every_steps,
    layers: Annotated[
        list[str] | None, _option("Layers to score: all-linear, or a regex of names; repeatable.", "Scoring")
    ] = None,
    method: Annotated[str, _option("auto, takeover, gram or contraction.", "Scoring")] = Default.method,
    optimizer_aware: Annotated[
        bool, _option("Score what the optimizer makes of the gradient.", "Scoring", "--optimizer-aware")
    ] = Default.optimizer_aware,
    second_order: Annotated[
        bool, _option("Add the curvature term of In-Run Data Shapley.", "Scoring", "--second-order")
    ] = Default.second_order,
    per_layer: Annotated[bool, _option("Keep scores by layer.", "Scoring", "--per-layer")] = Default.per_layer,
    grad_norms: Annotated[
        bool, _option("Keep gradient norms and cosines.", "Scoring", "--grad-norms")
    ] = Default.grad_norms,
    sample_losses: Annotated[
        bool, _option("Keep the loss of each sample.", "Scoring", "--sample-losses")
    ] = Default.sample_losses,
) -> None:
    """Fine-tune a causal LM and score every training sample by its effect on a validation set.

    Writes the model, the scores, the samples' texts and report.html to OUTPUT_DIR.
    """
    with _one_line_errors():
        config = GhostTrainConfig(**{**context.params, "val": _named(val), "layers": layers or None})
        _quiet()
        from hf_gradtools.ghost.train import prepare_run

        run = prepare_run(config)
        typer.echo(run.summary())
        try:
            stored = run.train()
        except KeyboardInterrupt:
            typer.secho("\nInterrupted. The same command with --resume continues it.", fg="red", err=True)
            raise
        if run.trainer.is_world_process_zero():
            report_path = stored.write_report()
            _print_ranking(stored)
            typer.echo(f"\nreport  {report_path}")


@app.command()
def report(
    output_dir: Annotated[Path, typer.Argument(help="OUTPUT_DIR of train, or output_dir of a GhostDotProdCallback.")],
    html: Annotated[
        Path | None, typer.Option(help="File to write; default report.html in OUTPUT_DIR.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(help="Samples listed as most helpful and as most harmful.", min=1)] = 20,
    val: Annotated[str | None, typer.Option(help="Only this validation set.", show_default=False)] = None,
) -> None:
    """Write the report of a run anew from its stored scores, also while it still trains."""
    with _one_line_errors():
        from hf_gradtools.ghost.stored_run import StoredRun

        stored = StoredRun.open(output_dir, val)
        path = stored.write_report(html, top_k)
        _print_ranking(stored)
        typer.echo(f"\nreport  {path}")


def _named(values: list[str]) -> str | dict[str, str]:
    """One validation source, or several given as name=source."""
    pairs = [re.fullmatch(r"([\w-]+)=(.+)", value) for value in values]
    if len(values) == 1 and (pairs[0] is None or Path(values[0]).exists()):
        return values[0]
    if unnamed := [value for value, pair in zip(values, pairs, strict=True) if pair is None]:
        raise ValueError(f"val={unnamed[0]!r} is one of several validation sets. Name each: --val name={unnamed[0]}")
    return {pair[1]: pair[2] for pair in pairs if pair}


def _print_ranking(stored: StoredRun) -> None:
    """The samples of lowest and highest value for each validation set, with the beginning of their texts."""
    for name, values in stored.values().items():
        helpful = [sample for sample in values.most_helpful(LISTED) if sample["value"] < 0]
        harmful = [sample for sample in values.most_harmful(LISTED) if sample["value"] > 0]
        for kind, colour, samples in (("helpful", "blue", helpful), ("harmful", "red", harmful)):
            typer.secho(f"\nMost {kind} (change of the loss on {name!r} by each sample)", bold=True)
            for sample in samples:
                typer.secho(f"{sample['value']:+10.2e}  ", fg=colour, nl=False)
                typer.echo(_excerpt(sample["sample_id"], stored.texts))
            if not samples:
                typer.echo("      none")


def _excerpt(sample_id: int | str, texts: dict[int | str, str]) -> str:
    """One line of the terminal on a sample."""
    line = f"{sample_id!s:>6}  {' '.join(texts.get(sample_id, '').split())}"
    width = max(shutil.get_terminal_size().columns - 13, 40)
    return line if len(line) <= width else line[: width - 1] + "…"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Says what is wrong in one line, in the words of the command line; a bug keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        options = "|".join(GhostTrainConfig.__dataclass_fields__)
        message = re.sub(rf"\b({options})=(True\b)?", _as_flag, " ".join(str(error).split()))
        typer.secho(f"Error: {message}", fg="red", err=True)
        raise typer.Exit(1) from error


def _as_flag(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')}" + ("" if match[2] else " ")


def _quiet() -> None:
    """Leaves the terminal to the progress bars and our own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
