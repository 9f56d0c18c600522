"""`hf-gradtools nanogpt sweep` and `search`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hf_gradtools.nanogpt.search.arguments import SearchArguments, SweepArguments
from hf_gradtools.workflow.terminal import one_line_errors, quiet


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.search.exploration import Run
    from hf_gradtools.nanogpt.search.greedy import SearchSettings
    from hf_gradtools.nanogpt.search.run_queue import Outcome

SHOWN = 10  # runs of a list


def run_experiments_main(argv: list[str] | None = None) -> None:
    """Runs an exploration.

    Args:
        argv (`list[str]`, *optional*): the words after the command; default `sys.argv`'s.
    """
    with _command(SweepArguments):
        arguments = _parsed(SweepArguments, "hf-gradtools nanogpt sweep", "Run the experiments of a file.", argv)
        from hf_gradtools.nanogpt.search.exploration import read_exploration
        from hf_gradtools.nanogpt.search.sweep import run_sweep
        from hf_gradtools.nanogpt.search.training_run import check_flags

        runs = read_exploration(
            arguments.config,
            format=arguments.config_format,
            prefix=arguments.prefix,
            include_common_group_in_name=arguments.include_common_group_in_name,
            expand_named_groups_in_names=arguments.expand_named_groups_in_names,
        )
        check_flags(run.config for run in runs)
        folder = _sweep_folder(arguments)
        typer.echo(f"{len(runs)} runs in {folder}")
        if arguments.dry_run:
            _list(runs)
            return
        outcomes = run_sweep(
            runs,
            folder,
            workers=arguments.workers,
            gpus=tuple(arguments.gpus),
            in_process=not arguments.spawn_subprocess,
            retry_failed=arguments.retry_failed,
            retry_stale=arguments.retry_stale,
            stale_seconds=arguments.stale_seconds,
            storage=arguments.storage,
            progress=arguments.progress,
        )
        _summarise(outcomes, folder)


def hyperparam_search_main(argv: list[str] | None = None) -> None:
    """Searches greedily.

    Args:
        argv (`list[str]`, *optional*): the words after the command; default `sys.argv`'s.
    """
    with _command(SearchArguments):
        text = "Improve a configuration step by step, each the best gain for what it costs."
        arguments = _parsed(SearchArguments, "hf-gradtools nanogpt search", text, argv)
        settings = _settings(arguments)
        baseline = _baseline(arguments)
        from hf_gradtools.nanogpt.search.greedy import greedy_search
        from hf_gradtools.nanogpt.search.pool import Pool
        from hf_gradtools.nanogpt.search.training_run import (
            PRELOAD,
            check_flags,
            layer_lists,
            report_of_flags,
            train_run,
        )

        check_flags([baseline])
        results = Path(arguments.results_file)
        folder = Path(arguments.output_dir) if arguments.output_dir else results.with_suffix("")
        pool = Pool(
            train_run,
            folder,
            workers=arguments.workers,
            gpus=tuple(arguments.gpus),
            preload=PRELOAD,
            in_process=not arguments.spawn_subprocess,
            stale_seconds=arguments.stale_seconds,
            storage=arguments.storage,
            progress=arguments.progress,
        )
        log = greedy_search(
            baseline,
            settings,
            pool,
            num_iterations=arguments.num_iterations,
            results_file=results,
            report=report_of_flags,
            layer_lists=layer_lists(),
            retry_failed=arguments.retry_failed,
        )
        _tell_path(log, results)
        _plot(log, Path(arguments.plot or folder / "path.png"), asked=arguments.plot is not None)


@contextlib.contextmanager
def _command(arguments: type) -> Iterator[None]:
    """One line for what is wrong, and an exit code."""
    try:
        with one_line_errors(arguments):
            quiet()
            try:
                yield
            except RuntimeError as error:  # of a baseline that failed, or of workers that cannot be kept alive
                raise ValueError(str(error)) from error
    except typer.Exit as ended:  # outside of a typer app nothing else would catch it
        raise SystemExit(ended.exit_code) from ended
    except KeyboardInterrupt:
        typer.secho("\nInterrupted. The same command continues it.", fg="red", err=True)
        raise SystemExit(130) from None


def _parsed(kind: type, prog: str, text: str, argv: list[str] | None) -> Any:
    from hf_gradtools.workflow.flags import parser_for

    (arguments,) = parser_for(kind, prog=prog, description=text).parse_args_into_dataclasses(argv)
    return arguments


def _sweep_folder(arguments: SweepArguments) -> Path:
    name = f"{arguments.prefix}{Path(arguments.config).stem}"
    return Path(arguments.output_dir) / (time.strftime("%Y%m%d_%H%M%S_") * arguments.use_timestamp + name)


def _list(runs: list[Run]) -> None:
    for run in runs:
        typer.echo(f"{run.key[:8]}  {run.name}")


def _summarise(outcomes: list[Outcome], folder: Path) -> None:
    complete = sorted((o for o in outcomes if o.error is None), key=lambda outcome: outcome.metrics["best_val_loss"])
    for outcome in complete[:SHOWN]:
        params = outcome.metrics.get("num_params")
        size = "" if params is None else f"{params:>13,} parameters"
        typer.echo(f"{outcome.metrics['best_val_loss']:10.4f}{size}  {outcome.run.name}")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed[:SHOWN]:
        typer.secho(f"    failed  {outcome.run.name}: {outcome.error['type']}: {outcome.error['message']}", fg="red")
    typer.echo(f"{len(complete)} complete, {len(failed)} failed: {folder / 'results.yaml'}")
    if failed:
        typer.echo("--retry_failed runs those that failed again.")
    if not complete:
        raise typer.Exit(1)


def _settings(arguments: SearchArguments) -> SearchSettings:
    from hf_gradtools.nanogpt.search.greedy import SearchSettings

    shared = SearchSettings.__dataclass_fields__.keys() - {"increments"}
    return SearchSettings(arguments.steps(), **{name: getattr(arguments, name) for name in shared})


def _baseline(arguments: SearchArguments) -> dict[str, Any]:
    """The flags of `orig_settings` and those that replace them."""
    from hf_gradtools.nanogpt.search.reading import parse_value, read_documents

    documents = read_documents(arguments.orig_settings)
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise ValueError(f"orig_settings={arguments.orig_settings!r} must hold one mapping of flags to values.")
    replaced = {}
    for word in arguments.override_cfg:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"override_cfg={word!r} is not KEY=VALUE.")
        replaced[name] = parse_value(value)
    return {**documents[0], **replaced}


def _tell_path(log: Mapping[str, Any], results: Path) -> None:
    from hf_gradtools.nanogpt.search.plots import accepted_path

    for cost, score, change in accepted_path(log):
        typer.echo(f"score {score:.5f}  {log['settings']['efficiency_target']} {cost:,.6g}  {change}")
    failed = sum("error" in entry for each in log["iterations"] for entry in each.get("candidates", []))
    if failed:
        typer.echo(f"{failed} candidates failed; their errors stand in the results.")
    ended = "no candidate pays" if log["stop_reason"] == "no_positive_efficiency" else "all rounds are done"
    typer.echo(f"{ended}: {results}")


def _plot(log: Mapping[str, Any], path: Path, *, asked: bool) -> None:
    from hf_gradtools.nanogpt.search.plots import plot_search

    try:
        plot_search(log, path)
    except ImportError as error:
        if asked:
            raise
        typer.echo(f"No figure: {error}")
    else:
        typer.echo(f"figure: {path}")
