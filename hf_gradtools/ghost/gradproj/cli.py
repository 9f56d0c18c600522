"""`hf-gradtools ghost project`, `search` and `info`: gradients of a corpus from the shell."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_gradtools.ghost.gradproj.run_config import ProjectConfig, SearchConfig
from hf_gradtools.workflow import terminal
from hf_gradtools.workflow.terminal import one_line_errors, option, quiet


if TYPE_CHECKING:
    from hf_gradtools.ghost.gradproj.store import GradientStore
    from hf_gradtools.ghost.gradproj.stored_run import Answer, StoredProjections


Default = ProjectConfig
LISTED = 5  # settings of a list


def register(app: typer.Typer) -> None:
    """Adds the commands to those of `hf-gradtools ghost`."""
    for command in (project, search, info):
        app.command(no_args_is_help=True)(command)


def project(
    context: typer.Context,
    model: terminal.Model,
    dataset: terminal.Rows,
    output_dir: terminal.OutputDir,
    split: terminal.Split = None,
    text_column: terminal.TextColumn = None,
    prompt_column: terminal.PromptColumn = None,
    response_column: terminal.ResponseColumn = None,
    max_length: terminal.MaxLength = Default.max_length,
    batch_size: Annotated[int, option("Rows in one forward.", "Model")] = Default.batch_size,
    dtype: Annotated[str | None, option("Type of the weights; default the checkpoint's.", "Model")] = None,
    checkpoint: Annotated[
        list[str] | None,
        option(
            "Folder of a Trainer checkpoint, in the place of --model's weights; repeatable, a store each.", "Model"
        ),
    ] = None,
    proj_rank_total: Annotated[
        int | None, option("Numbers stored per row; default 1024.", "Projection", show_default=False)
    ] = None,
    rank: Annotated[
        str | None,
        option(
            "Of the first stage: auto, 64, or k_in,k_out with 'full' for a whole side; default auto.",
            "Projection",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[
        int, option("2: all layers are added into one sketch. 1: they stand side by side.", "Projection")
    ] = Default.stages,
    basis: Annotated[str, option("orthonormal, gaussian, rademacher or pca.", "Projection")] = Default.basis,
    layers: Annotated[
        list[str] | None,
        option("all-linear, all, or a regex of names; repeatable; default all-linear.", "Projection"),
    ] = None,
    seed: Annotated[int, option("Of the projection.", "Projection")] = Default.seed,
    store_dtype: Annotated[str, option("float16, bfloat16 or float32.", "Projection")] = Default.store_dtype,
    on_uncovered: Annotated[
        str, option("error, warn or ignore if projections miss a part of the gradient.", "Projection")
    ] = Default.on_uncovered,
) -> None:
    """Project the gradient of every row of a dataset and store it, to be searched.

    Writes the gradients, the rows' texts and the options to OUTPUT_DIR. The same command continues a run that was
    stopped.
    """
    with one_line_errors(ProjectConfig):
        given = {**context.params, "checkpoint": checkpoint or [], "layers": layers or ["all-linear"]}
        config = ProjectConfig(**given)
        quiet()
        from hf_gradtools.ghost.gradproj.run import prepare_projection

        run = prepare_projection(config)
        if run.is_main:
            typer.echo(run.summary())
        with _continuable():
            stores = run.project()
        if run.is_main:
            for store in stores:
                typer.echo(_size(store))
            typer.echo(f"projected  {run.speed()}")
            for warning in run.warnings():
                typer.secho(f"note       {warning}", fg="yellow")
            typer.echo(f'\nSearch them: hf-gradtools ghost search {output_dir} --query "some text"')


def search(
    context: typer.Context,
    output_dir: Annotated[Path, typer.Argument(help="OUTPUT_DIR of project.")],
    query: Annotated[list[str] | None, option("Text; repeatable.", "Queries")] = None,
    query_response: Annotated[
        list[str] | None, option("Response to each --query, where rows are prompts and responses.", "Queries")
    ] = None,
    query_dataset: Annotated[str | None, option("Rows like those projected, instead of texts.", "Queries")] = None,
    query_split: Annotated[str | None, option("Split of these rows, such as test\\[:20].", "Queries")] = None,
    reduce: Annotated[
        str | None, option("One answer for all queries, by the mean or max of their scores.", "Queries")
    ] = None,
    top_k: Annotated[int, option("Rows for each query.", "Search", "--top-k", "-k")] = SearchConfig.top_k,
    metric: Annotated[str, option("cosine or dot.", "Search")] = SearchConfig.metric,
    precondition: Annotated[str, option("none, fisher or adam.", "Search")] = SearchConfig.precondition,
    damping: Annotated[float, option("Of fisher, in mean eigenvalues.", "Search")] = SearchConfig.damping,
    optimizer_state: Annotated[
        str | None, option("For adam: a Trainer checkpoint; default the one projected.", "Search")
    ] = None,
    model: Annotated[str | None, option("The model that was projected, if it has moved.", "Search")] = None,
    html: Annotated[
        Path | None, option("File to write; default search.html in OUTPUT_DIR.", "Search", show_default=False)
    ] = None,
) -> None:
    """Find the training rows whose gradients are nearest to those of texts or rows.

    Prints them, and writes them with their full texts and the shares of layers to an HTML page.
    """
    with one_line_errors(SearchConfig):
        given: dict[str, Any] = {**context.params, "output_dir": str(output_dir), "query": query or []}
        given.pop("html")
        config = SearchConfig(**{**given, "query_response": query_response or []})
        quiet()
        from hf_gradtools.ghost.gradproj.search_report import write_search_report
        from hf_gradtools.ghost.gradproj.stored_run import StoredProjections

        stored = StoredProjections(output_dir, model)
        queries = stored.query_rows(config)
        answers = stored.search(config, queries)
        _print(answers)
        if unfinished := [store.path.name for store in stored.stores if not store.complete]:
            typer.secho(f"\nNot all rows are there yet: {', '.join(unfinished)}.", fg="yellow", err=True)
        note = _try_to_add_layers(stored, answers, queries, reduce)
        path = write_search_report(
            answers,
            html or output_dir / "search.html",
            model=stored.model,
            figures=stored.figures(len(queries)),
            settings=stored.settings(config),
            note=note,
        )
        typer.echo(f"\nreport  {path}")


def info(
    output_dir: Annotated[Path, typer.Argument(help="OUTPUT_DIR of project, or a folder of gradients.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every byte with its checksum.")] = False,
) -> None:
    """Say what the stored gradients are, and whether they are undamaged."""
    with one_line_errors(SearchConfig):
        quiet()
        from hf_gradtools.ghost.gradproj.stored_run import open_stores

        for store in open_stores(output_dir):
            typer.secho(str(store.path), bold=True)
            for name, value in _flat(store.info()).items():
                typer.echo(f"  {name:17} {value}")
            if verify:
                typer.secho(f"  {'verified':17} {_verified(store)}", fg="green")


@contextmanager
def _continuable() -> Iterator[None]:
    """Tells who interrupts how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("\nInterrupted. The same command continues it.", fg="red", err=True)
        raise


def _try_to_add_layers(stored: StoredProjections, answers: list[Answer], queries: Any, reduce: str | None) -> str:
    """Adds the shares of layers, or says why it cannot."""
    try:
        stored.add_layers(answers, queries, reduce)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        typer.secho(f"\nNo shares of layers: {reason}", fg="yellow", err=True)
        return reason
    return ""


def _print(answers: list[Answer]) -> None:
    """Scores, ids and the beginnings of texts."""
    width = max(shutil.get_terminal_size().columns, 53)
    for answer in answers:
        typer.secho(f"\n{_line(answer.query, width)}", bold=True)
        for hit in answer.hits:
            typer.secho(f"{hit.score:+10.3g}  ", fg="blue" if hit.score >= 0 else "red", nl=False)
            typer.echo(f"{hit.sample_id!s:>6}  {_line(hit.text or '', width - 20)}")


def _line(text: str, width: int) -> str:
    """The text in one line of the terminal."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _size(store: GradientStore) -> str:
    facts = store.info()
    return (
        f"gradients  {store.path}: {facts['rows']:,} rows of {facts['layers']} layers, {facts['dim']:,} "
        f"{facts['dtype']} numbers each, {facts['bytes'] / 1e6:,.1f} MB"
    )


def _flat(facts: dict[str, Any]) -> dict[str, str]:
    """Facts in lines, long lists cut."""
    lines: dict[str, str] = {}
    for name, value in facts.items():
        if name in ("projection", "extra"):
            lines.update(_flat({key: inner for key, inner in value.items() if key not in lines and inner is not None}))
        elif isinstance(value, dict):
            lines[name] = ", ".join(f"{key} {inner}" for key, inner in value.items() if inner)
        elif isinstance(value, list):
            more = f", … ({len(value)})" if len(value) > LISTED else ""
            lines[name] = ", ".join(map(str, value[:LISTED])) + more
        else:
            lines[name] = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return lines


def _verified(store: GradientStore) -> str:
    checked = store.verify()
    left_out = f"; no checksums of {', '.join(checked.without_checksums)}" if checked.without_checksums else ""
    return f"{checked.files} files, {checked.bytes:,} bytes, {checked.rows:,} rows are as written{left_out}"
