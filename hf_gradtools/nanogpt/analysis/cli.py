"""`hf-gradtools nanogpt inspect`, `stats` and `softmax`: checkpoints, weights and activations, softmax variants."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from hf_gradtools.nanogpt.analysis.options import InspectOptions, SoftmaxOptions, StatsOptions
from hf_gradtools.nanogpt.sampling.terminal import command_line, plain_console


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig

__all__ = ["inspect_main", "softmax_main", "stats_main"]

PROG = "hf-gradtools nanogpt"
FIGURES = (".png", ".pdf", ".svg")
WEIGHTS = "Of each parameter: population standard deviation, excess kurtosis (0 for a normal distribution)."
ACTIVATIONS = "Of what each module computed at the tokens of the text."


def inspect_main(argv: list[str] | None = None) -> None:
    """Lists checkpoints; `argv` defaults to the process's own."""
    description = "Checkpoints below a folder, by validation loss."
    with command_line(InspectOptions, argv, f"{PROG} inspect", description) as options:
        from hf_gradtools.nanogpt.analysis.checkpoints import find_checkpoints
        from hf_gradtools.nanogpt.analysis.tables import check_ending, print_rows, write_rows

        check_ending(options.output, "output")
        found = find_checkpoints(options.directory, options.path_regex, options.sort, options.reverse)
        rows = [asdict(checkpoint) for checkpoint in found]
        console = plain_console()
        if not rows:
            console.print(Text(f"no checkpoints below {options.directory}"))
        else:
            print_rows(console, rows)
        if options.output is not None:
            _written(console, write_rows(options.output, rows))


def stats_main(argv: list[str] | None = None) -> None:
    """Statistics of weights and activations; `argv` defaults to the process's own."""
    description = "Standard deviation, kurtosis and largest value of weights, and of activations on a text."
    with command_line(StatsOptions, argv, f"{PROG} stats", description) as options:
        _stats(options, plain_console())


def softmax_main(argv: list[str] | None = None) -> None:
    """Compares softmax variants; `argv` defaults to the process's own."""
    description = "Weights that softmax variants make of one row of scores."
    with command_line(SoftmaxOptions, argv, f"{PROG} softmax", description) as options:
        _softmax(options, plain_console())


def _stats(options: StatsOptions, console: Console) -> None:
    from hf_gradtools.nanogpt.analysis.plots import plot_statistics, write_statistics_page
    from hf_gradtools.nanogpt.analysis.statistics import weight_statistics
    from hf_gradtools.nanogpt.analysis.tables import check_ending, print_rows, write_rows
    from hf_gradtools.nanogpt.sampling.loading import load_trained_model

    check_ending(options.output, "output")
    check_ending(options.figure, "figure", FIGURES)
    check_ending(options.html, "html", (".html",))
    model = load_trained_model(options.out_dir, options.device, options.dtype)
    tables = {"weights": weight_statistics(model)}
    if (activations := _activations(options, model)) is not None:
        tables["activations"] = activations
    for title, table in tables.items():
        print_rows(console, table.to_list(), title)
    if options.output is not None:
        columns = dict.fromkeys(("of", *(name for table in tables.values() for name in table.column_names)))
        rows = [{"of": title, **row} for title, table in tables.items() for row in table.to_list()]
        _written(console, write_rows(options.output, [{name: row.get(name) for name in columns} for row in rows]))
    if options.html is not None:
        texts = {"weights": WEIGHTS, "activations": ACTIVATIONS}
        shown = [(title, texts[title], table.to_list()) for title, table in tables.items()]
        _written(console, write_statistics_page(options.html, f"Statistics of {options.out_dir}", shown))
    for title, table in tables.items() if options.figure is not None else ():
        path = Path(options.figure)  # type: ignore[arg-type]
        path = path if title == "weights" else path.with_name(f"{path.stem}_{title}{path.suffix}")
        plot_statistics(table, path, f"{title} of {options.out_dir}")
        _written(console, path)


def _activations(options: StatsOptions, model: PreTrainedModel) -> Dataset | None:
    """On the text or the dataset, if there is one."""
    if options.text is None and options.dataset is None:
        return None
    from hf_gradtools.nanogpt.analysis.statistics import activation_statistics, block_batches
    from hf_gradtools.nanogpt.data import TokenFolder
    from hf_gradtools.nanogpt.sampling.generation import context_length, encode_prompt
    from hf_gradtools.nanogpt.sampling.loading import load_trained_tokenizer
    from hf_gradtools.nanogpt.sampling.options import SampleOptions

    if options.dataset is not None:
        ids = TokenFolder(options.dataset).tokens("val")[: options.max_tokens].tolist()
    else:
        tokenizer = load_trained_tokenizer(options.tokenizer or options.out_dir)
        text = SampleOptions(start=options.text or "").start_text()
        ids = encode_prompt(tokenizer, text)[: options.max_tokens]
    if (largest := max(ids)) >= model.config.get_text_config().vocab_size:
        raise ValueError(f"the text has token {largest}, which the model does not know; pass its own tokenizer.")
    block_size = context_length(model, options.block_size) or options.max_tokens
    return activation_statistics(model, block_batches(ids, block_size, options.batch_size), options.modules)


def _softmax(options: SoftmaxOptions, console: Console) -> None:
    import torch

    from hf_gradtools.nanogpt.analysis.plots import plot_softmax
    from hf_gradtools.nanogpt.analysis.softmax import softmax_weights
    from hf_gradtools.nanogpt.analysis.tables import check_ending, print_rows, write_rows

    check_ending(options.output, "output")
    check_ending(options.figure, "figure", FIGURES)
    config = _config(options.config)
    scores = torch.tensor(options.scores, dtype=torch.float64)
    weights = softmax_weights(scores, options.variants, config)
    summary: list[dict[str, Any]] = [
        {"variant": name, "sum": row.sum().item(), "largest": row.max().item(), "zeros": int((row == 0).sum())}
        for name, row in weights.items()
    ]
    print_rows(console, summary)
    if options.output is not None:
        columns = {"score": scores, **weights}
        rows = [{name: column[i].item() for name, column in columns.items()} for i in range(len(scores))]
        _written(console, write_rows(options.output, rows))
    if options.figure is not None:
        plot_softmax(scores, weights, options.figure)
        _written(console, Path(options.figure))


def _config(given: dict[str, Any]) -> NanoGPTConfig:
    """A configuration with options of the variants; a misspelt one, which it would keep without a word, is refused."""
    from dataclasses import fields

    from huggingface_hub.errors import StrictDataclassError

    from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig

    if not isinstance(given, dict):
        raise ValueError(f"config: {given!r} is no mapping of fields to values.")
    if unknown := sorted(given.keys() - {field.name for field in fields(NanoGPTConfig)}):
        raise ValueError(f"config: NanoGPTConfig has no {', '.join(unknown)}.")
    try:
        return NanoGPTConfig(**{"n_layer": 1, **given})
    except StrictDataclassError as error:
        raise ValueError(f"config: {error.__cause__ or error}") from error


def _written(console: Console, path: Path) -> None:
    console.print(Text(f"written  {path}"), soft_wrap=True)
