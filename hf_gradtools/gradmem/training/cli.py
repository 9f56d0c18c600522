"""`hf-gradtools gradmem train`, `eval` and `plot`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer

from hf_gradtools.gradmem.training.cli_options import EvalOptions, PlotOptions
from hf_gradtools.gradmem.training.options import TrainOptions
from hf_gradtools.workflow.terminal import one_line_errors, quiet


__all__ = ["eval_main", "plot_main", "train_main"]

Options = TypeVar("Options")


def train_main(argv: list[str] | None = None) -> None:
    """Trains as the command line says, and tells of each evaluation.

    Args:
        argv (`list[str]`, *optional*): the words after the command; default `sys.argv`'s.
    """
    _run("train", "Train on key-value retrieval, from a memory or from the prompt.", TrainOptions, _train, argv)


def eval_main(argv: list[str] | None = None) -> None:
    """Evaluates a trained model as the command line says; the figures are JSON. `argv` as for [`train_main`]."""
    _run("eval", "Evaluate a trained model on key-value retrieval.", EvalOptions, _eval, argv)


def plot_main(argv: list[str] | None = None) -> None:
    """Draws figures and prints tables as the command line says. `argv` as for [`train_main`]."""
    _run("plot", "Tables and figures of results, and of what an answer costs.", PlotOptions, _plot, argv)


def _run(
    command: str, description: str, kind: type[Options], body: Callable[[Options], None], argv: list[str] | None
) -> None:
    """Parses the words, and runs a body whose errors are told in one line."""
    try:
        with one_line_errors(kind):
            quiet()
            from hf_gradtools.workflow.flags import given_flags, parser_for

            parser = parser_for(kind, prog=f"hf-gradtools gradmem {command}", description=description)
            body(kind(**given_flags(parser, argv)))
    except typer.Exit as ended:  # outside of a typer app nothing else would catch it
        raise SystemExit(ended.exit_code) from ended
    except KeyboardInterrupt:
        hint = " The same command with --resume continues it." if command == "train" else ""
        typer.secho(f"\nInterrupted.{hint}", fg="red", err=True)
        raise SystemExit(130) from None


def _train(options: TrainOptions) -> None:
    from hf_gradtools.gradmem.training.workflow import train

    result = train(options, echo=typer.echo)
    if result:  # in the first process alone
        metrics = result["metrics"]
        typer.echo(
            f"{options.exp_path}: exact match {metrics['exact_match']:.4f} on {result['task']} at step "
            f"{result['best_step']} of {result['steps']}; generated {metrics['generated_exact_match']:.4f}; with "
            f"another row's context {result['wrong_context_exact_match']:.4f}"
            + (f"; a guess {result['chance']:.4f}" if result["chance"] is not None else "")
        )


def _eval(options: EvalOptions) -> None:
    from hf_gradtools.core.atomic import as_json_bytes, write_json_atomically
    from hf_gradtools.gradmem.training.saved import evaluate_saved

    results = evaluate_saved(options)
    figures: Any = results if len(results) > 1 else results[0]
    typer.echo(as_json_bytes(figures).decode().rstrip())
    if options.out is not None:
        write_json_atomically(Path(options.out), figures)


def _plot(options: PlotOptions) -> None:
    from hf_gradtools.gradmem.training.plot import accuracy_table, cost_table, plot_accuracy, plot_costs
    from hf_gradtools.gradmem.training.results import read_results
    from hf_gradtools.gradmem.training.saved import costs_of_saved

    if options.results:
        results = read_results(options.results)
        typer.echo(accuracy_table(results, options.metric))
        if options.out is not None:
            plot_accuracy(results, Path(options.out), options.metric)
    if options.cost_of is not None:
        costs = costs_of_saved(options)
        typer.echo(cost_table(costs, options.queries))
        if options.cost_out is not None:
            plot_costs(costs, options.queries, Path(options.cost_out))
