"""`hf-gradtools ghost`: scores training samples from the shell."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_gradtools.ghost.gradproj.cli import register
from hf_gradtools.ghost.train_config import GhostTrainConfig
from hf_gradtools.workflow import terminal
from hf_gradtools.workflow.terminal import one_line_errors, option, quiet, resumable


if TYPE_CHECKING:
    from hf_gradtools.ghost.stored_run import StoredRun


app = typer.Typer(
    help="Score training samples while a model trains; store and search the gradients of a whole corpus.",
    no_args_is_help=True,
)

LISTED = 5  # samples of each kind
Default = GhostTrainConfig


@app.command(no_args_is_help=True)
def train(
    context: typer.Context,
    model: terminal.Model,
    dataset: terminal.Rows,
    output_dir: terminal.OutputDir,
    split: terminal.Split = None,
    val: Annotated[
        list[str],
        option(
            "Validation rows: like --dataset, or how many training rows to hold out, or their share. "
            "Several sets: --val name=rows, repeated.",
            "Data",
        ),
    ] = [Default.val],  # noqa: B006 - typer copies it
    val_split: terminal.ValSplit = None,
    text_column: terminal.TextColumn = None,
    prompt_column: terminal.PromptColumn = None,
    response_column: terminal.ResponseColumn = None,
    max_length: terminal.MaxLength = Default.max_length,
    lora: Annotated[
        bool, option("Train adapters on all linear layers, or all weights.", "Training", "--lora/--full")
    ] = Default.lora,
    lora_rank: Annotated[int, option("Rank of the adapters.", "Training")] = Default.lora_rank,
    epochs: terminal.Epochs = Default.epochs,
    max_steps: terminal.MaxSteps = Default.max_steps,
    batch_size: terminal.BatchSize = Default.batch_size,
    gradient_accumulation_steps: terminal.AccumulationSteps = Default.gradient_accumulation_steps,
    learning_rate: Annotated[
        float | None, option("Peak learning rate; default 2e-4 for --lora, 2e-5 for --full.", "Training")
    ] = None,
    seed: terminal.Seed = Default.seed,
    dtype: Annotated[
        str | None,
        option("Type of the weights; default the checkpoint's for --lora, float32 for --full.", "Training"),
    ] = None,
    bf16: terminal.Bf16 = Default.bf16,
    save_steps: terminal.SaveSteps = Default.save_steps,
    report_to: terminal.ReportTo = Default.report_to,
    resume: terminal.Resume = Default.resume,
    val_batch_size: Annotated[
        int, option("Validation rows behind the score of a step.", "Scoring")
    ] = Default.val_batch_size,
    every_steps: Annotated[int, option("Score every so many steps.", "Scoring")] = Default.every_steps,
    layers: Annotated[
        list[str] | None, option("Layers to score: all-linear, or a regex of names; repeatable.", "Scoring")
    ] = None,
    method: Annotated[str, option("auto, takeover, gram or contraction.", "Scoring")] = Default.method,
    optimizer_aware: Annotated[
        bool, option("Score what the optimizer makes of the gradient.", "Scoring", "--optimizer-aware")
    ] = Default.optimizer_aware,
    second_order: Annotated[
        bool, option("Add the curvature term of In-Run Data Shapley.", "Scoring", "--second-order")
    ] = Default.second_order,
    per_layer: Annotated[bool, option("Keep scores by layer.", "Scoring", "--per-layer")] = Default.per_layer,
    grad_norms: Annotated[
        bool, option("Keep gradient norms and cosines.", "Scoring", "--grad-norms")
    ] = Default.grad_norms,
    sample_losses: Annotated[
        bool, option("Keep the loss of each sample.", "Scoring", "--sample-losses")
    ] = Default.sample_losses,
) -> None:
    """Fine-tune a causal LM and score every training sample by its effect on a validation set.

    Writes the model, the scores, the samples' texts and report.html to OUTPUT_DIR.
    """
    with one_line_errors(GhostTrainConfig):
        config = GhostTrainConfig(**{**context.params, "val": _named(val), "layers": layers or None})
        quiet()
        from hf_gradtools.ghost.train import prepare_run

        run = prepare_run(config)
        typer.echo(run.summary())
        with resumable():
            stored = run.train()
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
    with one_line_errors(GhostTrainConfig):
        from hf_gradtools.ghost.stored_run import StoredRun

        stored = StoredRun.open(output_dir, val)
        path = stored.write_report(html, top_k)
        _print_ranking(stored)
        typer.echo(f"\nreport  {path}")


register(app)


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
