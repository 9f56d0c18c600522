"""`hf-gradtools grit`: trains GRIT adapters from the shell, and looks at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_gradtools.grit.train_config import GritTrainConfig
from hf_gradtools.workflow import terminal
from hf_gradtools.workflow.terminal import one_line_errors, option, quiet, resumable


if TYPE_CHECKING:
    from hf_gradtools.grit.config import GritConfig


app = typer.Typer(
    help="Train LoRA adapters steered by the Fisher information of their rank space.", no_args_is_help=True
)

Default = GritTrainConfig
Adapter = Annotated[str, typer.Argument(help="Saved GRIT adapter: Hub id or folder.")]


@app.command(no_args_is_help=True)
def train(
    context: typer.Context,
    model: terminal.Model,
    dataset: terminal.Rows,
    output_dir: terminal.OutputDir,
    split: terminal.Split = None,
    val: Annotated[
        str,
        option("Validation rows: like --dataset, or how many training rows to hold out, or their share.", "Data"),
    ] = Default.val,
    val_split: terminal.ValSplit = None,
    text_column: terminal.TextColumn = None,
    prompt_column: terminal.PromptColumn = None,
    response_column: terminal.ResponseColumn = None,
    max_length: terminal.MaxLength = Default.max_length,
    qlora: Annotated[bool, option("Quantise the base model to 4 bits.", "Adapter", "--qlora")] = Default.qlora,
    preset: Annotated[str | None, option("Settings of the paper: short, long or seed.", "Adapter")] = None,
    rank: Annotated[int, option("Rank of every layer at the start.", "Adapter")] = Default.rank,
    alpha: Annotated[int | None, option("Of LoRA; default twice the rank.", "Adapter")] = None,
    rank_adaptation_threshold: Annotated[
        float | None, option("Share of the spectrum that a cut keeps, such as 0.99.", "Adapter")
    ] = None,
    preconditioner: Annotated[str | None, option("rank_soap, kfac, grit or none.", "Adapter")] = None,
    reprojection: Annotated[str | None, option("balanced, two_sided, one_sided or none.", "Adapter")] = None,
    target_modules: Annotated[
        str, option("all-linear, or names of layers: q_proj,v_proj.", "Adapter")
    ] = Default.target_modules,
    epochs: terminal.Epochs = Default.epochs,
    max_steps: terminal.MaxSteps = Default.max_steps,
    batch_size: terminal.BatchSize = Default.batch_size,
    gradient_accumulation_steps: terminal.AccumulationSteps = Default.gradient_accumulation_steps,
    learning_rate: Annotated[float, option("Peak learning rate.", "Training")] = Default.learning_rate,
    warmup: Annotated[float, option("Steps of warmup, or their share if below 1.", "Training")] = Default.warmup,
    lr_scheduler_type: Annotated[str, option("linear, cosine, constant, ...", "Training")] = Default.lr_scheduler_type,
    seed: terminal.Seed = Default.seed,
    dtype: Annotated[
        str | None, option("Type of weights that are not quantised; default the checkpoint's.", "Training")
    ] = None,
    bf16: terminal.Bf16 = Default.bf16,
    gradient_checkpointing: Annotated[
        bool, option("Compute activations twice to save their memory.", "Training", "--gradient-checkpointing")
    ] = Default.gradient_checkpointing,
    eval_steps: Annotated[
        int | None, option("Steps between evaluations; one before and one after take place anyway.", "Training")
    ] = None,
    save_steps: terminal.SaveSteps = Default.save_steps,
    logging_steps: Annotated[int, option("Steps between logs.", "Training")] = Default.logging_steps,
    report_to: terminal.ReportTo = Default.report_to,
    resume: terminal.Resume = Default.resume,
) -> None:
    """Fine-tune a causal LM by a GRIT adapter.

    Writes the adapter, grit_ranks.json and metrics.json to OUTPUT_DIR.
    """
    with one_line_errors(GritTrainConfig):
        config = GritTrainConfig(**context.params)
        quiet()
        from hf_gradtools.grit.train import prepare_run

        run = prepare_run(config)
        typer.echo(run.summary())
        with resumable():
            metrics = run.train()
        if run.trainer.is_world_process_zero():
            typer.echo(
                f"\nloss        {metrics['eval_loss_before']:.4f} before, {metrics['eval_loss_after']:.4f} after"
            )
            typer.echo(f"adapter     {_size(metrics)}: {config.output_dir}")


@app.command()
def inspect(
    adapter: Adapter,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plots: Annotated[
        Path | None, typer.Option(help="Folder to draw figures of ranks and spectra in.", show_default=False)
    ] = None,
) -> None:
    """Show the ranks of a saved adapter's layers. Its base model is not loaded."""
    with one_line_errors(GritTrainConfig):
        report = _read_report(adapter)
        figures = [] if plots is None else _draw(report, plots)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    width = max(map(len, report["layers"]))
    typer.secho(f"{'layer':{width}}  rank  base rank  parameters", bold=True)
    for name, row in report["layers"].items():
        typer.echo(f"{name:{width}}  {row['rank']:4}  {row['base_rank']:9}  {row['parameters']:10,}")
    typer.echo(f"\n{_size(report)}")
    for figure in figures:
        typer.echo(f"figure  {figure}")


@app.command()
def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Write a saved adapter as a plain LoRA adapter, which PEFT loads without this package."""
    with one_line_errors(GritTrainConfig):
        from hf_gradtools.grit.export import export_lora

        export_lora(adapter, output)
    typer.echo(f"LoRA adapter  {output}")


def _size(report: dict[str, Any]) -> str:
    return (
        f"{report['parameters']:,} of {report['base_parameters']:,} parameters ({report['reduction']:.1%} fewer than "
        "at the start)"
    )


def _read_report(adapter: str) -> dict[str, Any]:
    """Ranks and sizes from the adapter's tensors; spectra from `grit_ranks.json`, where training has left it."""
    from peft import PeftConfig
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    from hf_gradtools.grit.config import GritConfig

    try:
        config = PeftConfig.from_pretrained(adapter)
        weights = _file(adapter, SAFETENSORS_WEIGHTS_NAME)
    except (ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"adapter {adapter!r} cannot be read: {reason}. Pass Hub id or folder of a saved GRIT adapter."
        ) from error
    if not isinstance(config, GritConfig):
        raise ValueError(f"adapter {adapter!r} is of type {config.peft_type}. Pass one that GRIT has trained.")
    layers = _read_layers(config, weights)
    trained = _read_trained(adapter)
    for name, row in layers.items():
        # What was measured of another adapter, left in the same folder, says nothing of this one.
        measured = trained["layers"].get(name)
        if isinstance(measured, dict) and measured.get("rank") == row["rank"]:
            layers[name] = {**measured, **row}
    after = sum(row["parameters"] for row in layers.values())
    before = sum(row["parameters"] // row["rank"] * row["base_rank"] for row in layers.values())
    return {
        **{name: trained[name] for name in ("steps", "threshold") if name in trained},
        "layers": layers,
        "parameters": after,
        "base_parameters": before,
        "reduction": 1 - after / before,
    }


def _read_trained(adapter: str) -> dict[str, Any]:
    """What training has measured; nothing of a checkpoint, of an adapter moved without the file, of another file."""
    from hf_gradtools.grit.callback import RANKS_FILE
    from hf_gradtools.grit.report import read_report

    try:
        report = read_report(_file(adapter, RANKS_FILE))
    except (OSError, ValueError):
        return {"layers": {}}
    return report if isinstance(report["layers"], dict) else {"layers": {}}


def _read_layers(config: GritConfig, weights: Path) -> dict[str, dict[str, int]]:
    from safetensors import SafetensorError, safe_open

    from hf_gradtools.grit.model import initial_rank

    layers = {}
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged ({error}). Save or download the adapter again.") from error
    for key, shape in shapes.items():
        name, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if found and len(shape) == 2:
            (rank, fan_in), (fan_out, _) = shape, shapes[key.replace(".lora_A.", ".lora_B.")]
            parameters = rank * (fan_in + fan_out)
            layers[name] = {"rank": rank, "base_rank": initial_rank(config, name), "parameters": parameters}
    if not layers:
        raise ValueError(f"{weights} holds no linear layer of LoRA. Pass a folder that save_pretrained has written.")
    return layers


def _file(adapter: str, name: str) -> Path:
    """Path of a file of the adapter, from the Hub if it is no folder; OSError if there is none."""
    if Path(adapter).is_dir():
        path = Path(adapter) / name
        if not path.is_file():
            raise FileNotFoundError(f"it has no {name}")
        return path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(adapter, name))


def _draw(report: dict[str, Any], folder: Path) -> list[Path]:
    from hf_gradtools.grit.plots import plot_ranks, plot_spectra

    folder.mkdir(parents=True, exist_ok=True)
    plot_ranks(report, folder / "ranks.png")
    if not any("balanced" in row for row in report["layers"].values()):  # nothing was measured, or it was lost
        return [folder / "ranks.png"]
    plot_spectra(report, folder / "spectra.png")
    return [folder / "ranks.png", folder / "spectra.png"]
