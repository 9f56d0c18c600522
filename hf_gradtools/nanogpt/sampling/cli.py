"""`hf-gradtools nanogpt sample`: text from a trained model, its colours and heatmaps, its scores on benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.nanogpt.sampling.options import SampleOptions
from hf_gradtools.nanogpt.sampling.terminal import command_line, plain_console


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_gradtools.nanogpt.sampling.generation import Sample

__all__ = ["main", "run"]

PROG = "hf-gradtools nanogpt sample"
SCALES = {
    "softmax": "Colour: the probability of each token under the model, from red (0) to green (1).",
    "softmax_top_k": "Colour: the probability that each token was drawn with, from red (0) to green (1).",
    "minmax": "Colour: the logit of each token, from the lowest of the text (red) to the highest (green).",
    "rank": "Colour: the rank of each token, from the likeliest (green) to the 100th and beyond (red).",
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line `argv`, default the process's own."""
    with command_line(SampleOptions, argv, PROG, "Samples from a trained model, or scores of lm-eval.") as options:
        run(options)


def run(options: SampleOptions, console: Console | None = None) -> None:
    """Draws, shows and writes samples, or scores the model, as the options say.

    Args:
        options (`SampleOptions`): what to do.
        console (`Console`, *optional*): where to print; default the terminal.

    Raises:
        ValueError: the model, its tokenizer, the prompt or a task cannot be used.
        ImportError: an extra that the options need is not installed.
    """
    from hf_gradtools.nanogpt.sampling.loading import load_trained

    console = console or plain_console()
    start = options.start_text()
    model, tokenizer = load_trained(options.source, options.tokenizer, options.device, options.dtype)
    if options.print_model_info:
        _print_model_info(console, model, options)
    if options.lm_eval_tasks is not None:
        _score(console, model, tokenizer, options)
        return
    _draw(console, model, tokenizer, options, start)


def _draw(
    console: Console, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, start: str
) -> None:
    from hf_gradtools.nanogpt.sampling.generation import encode_prompt, generate_samples

    prompt_ids = encode_prompt(tokenizer, start)
    keep = options.colorize_output or options.show_heatmaps
    shown: list[dict[str, Any]] = []
    texts: list[str] = []
    ks = options.top_k if options.softmax_threshold is None else [0]
    for top_k in ks:
        for number, sample in enumerate(generate_samples(model, tokenizer, prompt_ids, options, top_k, keep)):
            name = _name(options, top_k, number)
            texts.append(
                f"--- {name}, seed {options.seed}\n{_show(console, tokenizer, sample, options, name, shown)}\n\n"
            )
            if options.show_heatmaps:
                _heatmap(console, tokenizer, sample, options, name)
    if shown:
        from hf_gradtools.nanogpt.sampling.pages import write_page

        title = f"Samples of {options.source}"
        _written(console, write_page("samples.html.j2", options.charts() / "samples.html", title=title, samples=shown))
    if options.sample_file is not None:
        _written(console, _append(Path(options.sample_file), "".join(texts)))


def _show(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    options: SampleOptions,
    name: str,
    shown: list[dict[str, Any]],
) -> str:
    """Prints a sample in every way asked for, adds what the page shows of it; its plain text."""
    from hf_gradtools.nanogpt.sampling.display import Piece, colored_pieces, print_text, rich_text, top_k_table
    from hf_gradtools.nanogpt.sampling.segments import decode, segment_tokens

    ids = sample.prompt_ids + sample.ids
    text = decode(tokenizer, ids)
    if options.token_boundary:
        text = options.token_boundary.join(segment.text for segment in segment_tokens(tokenizer, ids))
    if not options.colorize_output:
        console.print(Text(f"--- {name}", "bold cyan"))
        print_text(console, rich_text([Piece(text)]))
        return text
    for mode in options.modes:
        console.print(Text(f"--- {name}, {mode}", "bold cyan"))
        if mode == "topk":
            console.print(top_k_table(tokenizer, sample, options.colorize_topk))
            continue
        pieces = colored_pieces(tokenizer, sample, mode, options.token_boundary)
        print_text(console, rich_text(pieces))
        shown.append({"title": f"{name}, {mode}", "scale": SCALES[mode], "pieces": pieces})
    return text


def _heatmap(
    console: Console, tokenizer: PreTrainedTokenizerBase, sample: Sample, options: SampleOptions, name: str
) -> None:
    import torch

    from hf_gradtools.nanogpt.sampling.heatmap import Heatmap, plot_heatmap, top_tokens
    from hf_gradtools.nanogpt.sampling.pages import write_page

    assert sample.logits is not None  # asked for by show_heatmaps
    heatmap = Heatmap.of(tokenizer, top_tokens(sample.logits, torch.tensor(sample.ids), options.colorize_topk))
    path = options.charts() / ("heatmap_" + name.replace(" ", "_").replace(",", ""))
    for written in plot_heatmap(heatmap, path.with_name(path.name + ".png"), f"{options.source}: {name}"):
        _written(console, written)
    rows, page = heatmap.rows(), path.with_name(path.name + ".html")
    width = len(heatmap.labels[0])
    _written(console, write_page("heatmap.html.j2", page, title=f"{options.source}: {name}", rows=rows, width=width))


def _score(
    console: Console, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SampleOptions
) -> None:
    from hf_gradtools.nanogpt.sampling.benchmarks import evaluate_tasks, result_rows

    assert options.lm_eval_tasks is not None
    results = evaluate_tasks(
        model,
        tokenizer,
        [task.strip() for task in options.lm_eval_tasks.split(",") if task.strip()],
        options.lm_eval_include_path,
        batch_size=options.lm_eval_batch_size,
        limit=options.lm_eval_limit,
        block_size=options.block_size,
    )
    rows = result_rows(results)
    table = Table("task", "n-shot", "metric", "filter", "value", "stderr")
    for row in rows:
        cells = [row["task"], row["n_shot"], row["metric"], row["filter"], row["value"], row["stderr"]]
        table.add_row(*(Text("" if x is None else f"{x:.4f}" if isinstance(x, float) else str(x)) for x in cells))
    console.print(table)
    path = Path(options.lm_eval_output) if options.lm_eval_output else options.charts() / "lm_eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps({"model": options.source, "rows": rows, **results}, indent=2, default=str).encode())
    _written(console, path)


def _name(options: SampleOptions, top_k: int, number: int) -> str:
    if options.softmax_threshold is not None:
        return f"threshold {options.softmax_threshold:g}, sample {number + 1}"
    return f"{f'top_k {top_k}' if top_k else 'all tokens'}, sample {number + 1}"


def _append(path: Path, text: str) -> Path:
    """The file with `text` after what it has."""
    before = path.read_bytes() if path.exists() else b""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(before + text.encode())
    return path


def _written(console: Console, path: Path) -> None:
    console.print(Text(f"written  {path}"), soft_wrap=True)


def _print_model_info(console: Console, model: PreTrainedModel, options: SampleOptions) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    weights = f"{parameters:,} parameters, {str(model.dtype).removeprefix('torch.')} on {model.device}"
    console.print(Text(f"model    {options.source}: {type(model).__name__}, {weights}"), soft_wrap=True)
