"""`hf-gradtools ghosttrack`: the five phases, all of them, and what goes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_gradtools.workflow.terminal import one_line_errors, option, quiet


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig


app = typer.Typer(
    help="Detect hallucinations by what sparse autoencoders see in every layer of a model.", no_args_is_help=True
)

Config = Annotated[
    str, option("YAML file, or a shipped name: gpt2-small, gpt2-medium, smollm2-135m, template.", "Run")
]
Layers = Annotated[
    str | None, option("Layers: all, a range such as 0-3, or a list; default extraction.layers.", "Run")
]
Overrides = Annotated[
    list[str] | None, option("A setting in place of the file's: section.key=value; repeatable.", "Run", "--set")
]
Force = Annotated[bool, option("Make anew what is there already.", "Run", "--force")]
Output = Annotated[Path | None, option("File to write; default the terminal.", "Output")]


@app.command(no_args_is_help=True)
def extract(config: Config, layers: Layers = None, overrides: Overrides = None, force: Force = False) -> None:
    """1: write the hidden states that autoencoders learn from."""
    _run("extract", config, layers, overrides, force)


@app.command(no_args_is_help=True)
def train(config: Config, layers: Layers = None, overrides: Overrides = None, force: Force = False) -> None:
    """2: train an autoencoder for each layer, all in one pass."""
    _run("train", config, layers, overrides, force)


@app.command(no_args_is_help=True)
def track(config: Config, layers: Layers = None, overrides: Overrides = None, force: Force = False) -> None:
    """3: read labelled answers, and track features through the layers."""
    _run("track", config, layers, overrides, force)


@app.command(no_args_is_help=True)
def detect(config: Config, layers: Layers = None, overrides: Overrides = None, force: Force = False) -> None:
    """4: fit and save detectors."""
    _run("detect", config, layers, overrides, force)


@app.command(no_args_is_help=True)
def evaluate(config: Config, layers: Layers = None, overrides: Overrides = None, force: Force = False) -> None:
    """5: compare detectors and baselines; write tables and a dashboard."""
    _run("evaluate", config, layers, overrides, force)


@app.command(no_args_is_help=True)
def run(config: Config, layers: Layers = None, overrides: Overrides = None, force: Force = False) -> None:
    """All five phases on this machine; what is finished is skipped."""
    with _talking():
        settings = _read(config, overrides)
        from hf_gradtools.ghosttrack.phases.runner import run_pipeline

        run_pipeline(settings, layers, force, on_summary=typer.echo)


@app.command(no_args_is_help=True)
def dashboard(config: Config, layers: Layers = None, overrides: Overrides = None) -> None:
    """Write the dashboards of a finished evaluation anew."""
    with _talking():
        settings = _read(config, overrides)
        from hf_gradtools.ghosttrack.phases.evaluate import write_dashboards

        for path in write_dashboards(settings, layers):
            typer.echo(f"dashboard  {path}")


@app.command(no_args_is_help=True)
def sbatch(
    config: Config,
    gpus: Annotated[int, option("GPUs that share out the layers.", "Job")] = 4,
    job_name: Annotated[str, option("Of the job and its log.", "Job")] = "full_pipeline",
    time: Annotated[str, option("Limit of the job.", "Job")] = "24:00:00",
    partition: Annotated[str | None, option("To submit to.", "Job")] = None,
    account: Annotated[str | None, option("To charge.", "Job")] = None,
    cpus_per_gpu: Annotated[int, option("CPU cores.", "Job")] = 8,
    memory_gb_per_gpu: Annotated[int, option("Host memory in GB.", "Job")] = 64,
    setup: Annotated[list[str] | None, option("Line of bash to run first; repeatable.", "Job")] = None,
    overrides: Overrides = None,
    output: Output = None,
) -> None:
    """Write a Slurm job that runs all phases, the layers shared out over GPUs."""
    with one_line_errors():
        settings = _read(config, overrides)
        from hf_gradtools.ghosttrack.phases.sbatch import make_sbatch

        script = make_sbatch(
            settings,
            gpus,
            config_path=config,
            job_name=job_name,
            time=time,
            partition=partition,
            account=account,
            cpus_per_gpu=cpus_per_gpu,
            memory_gb_per_gpu=memory_gb_per_gpu,
            overrides=overrides or (),
            setup=setup or (),
        )
        _write(script, output)


@app.command(name="config")
def write_config(
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of any causal LM; default the template as it is.")
    ] = None,
    output: Output = None,
) -> None:
    """Write a configuration for a model: its width and depth filled in, all keys explained."""
    with one_line_errors():
        from hf_gradtools.ghosttrack.settings.configuration import find_config

        if model is None:
            _write(find_config("template").read_text(encoding="utf-8"), output)
            return
        from hf_gradtools.ghosttrack.settings.template import template_for

        _write(template_for(model), output)


@app.command(no_args_is_help=True)
def questions(
    task: Annotated[str, option("triviaqa, nq, qa (other questions), arc, mmlu, or claims.", "Data")],
    output: Annotated[Path, option("A .jsonl file, or a folder.", "Data")],
    model: Annotated[str | None, option("Hub id or folder of the model that answers.", "Data")] = None,
    dataset: Annotated[str | None, option("Hub id, file or folder; default the task's.", "Data")] = None,
    split: Annotated[str | None, option("Of a Hub id.", "Data")] = None,
    limit: Annotated[int | None, option("Questions at most, drawn at random.", "Data")] = None,
    seed: Annotated[int, option("Of all draws.", "Data")] = 0,
    batch_size: Annotated[int, option("Questions at a time.", "Answers")] = 64,
    max_new_tokens: Annotated[int, option("Of an answer.", "Answers")] = 24,
    wrong_per_right: Annotated[float, option("Wrong answers kept per right one; 0 keeps all.", "Answers")] = 2.0,
    samples: Annotated[int, option("More answers to each, for semantic entropy.", "Answers")] = 0,
    claim_column: Annotated[str, option("Of the claims.", "Claims")] = "claim",
    label_column: Annotated[str, option("Of their labels.", "Claims")] = "label",
    true_value: Annotated[list[str] | None, option("Label that means true; repeatable.", "Claims")] = None,
) -> None:
    """Make labelled answers: a model's own to questions, or true and false claims."""
    with _talking():
        from hf_gradtools.ghosttrack.answers.question_sets import QuestionSet

        made = QuestionSet(
            task,
            dataset=dataset,
            split=split,
            model=model,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            wrong_per_right=wrong_per_right or None,
            samples=samples,
            claim_column=claim_column,
            label_column=label_column,
            true_values=true_value or QuestionSet.true_values,
            seed=seed,
        )
        rows = made.make(output)
        typer.echo(f"{len(rows)} answers, {sum(rows['label'])} of them wrong  {output}")


def _run(phase: str, config: str, layers: str | None, overrides: list[str] | None, force: bool) -> None:
    with _talking():
        settings = _read(config, overrides)
        from hf_gradtools.ghosttrack.phases.runner import run_phase

        typer.echo(run_phase(phase, settings, layers, force))


def _read(config: str, overrides: list[str] | None) -> GhostTrackConfig:
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig

    return GhostTrackConfig.from_yaml(config, overrides or ())


@contextmanager
def _talking() -> Iterator[None]:
    """Errors in one line, and how an interrupted command goes on."""
    with one_line_errors():
        quiet()
        try:
            yield
        except KeyboardInterrupt:
            typer.secho("\nInterrupted. The same command goes on from here.", fg="red", err=True)
            raise


def _write(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=not text.endswith("\n"))
        return
    from hf_gradtools.core.atomic import atomic_write

    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(text.encode())
    typer.echo(f"wrote  {output}")
