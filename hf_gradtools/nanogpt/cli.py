"""`hf-gradtools nanogpt`: each command hands its words to a parser of its own, with that workflow's flags alone.

The same functions stand behind `examples/nanogpt/*.py`.
"""

from __future__ import annotations

import typer

from hf_gradtools.workflow.terminal import add_commands


# Command: its module, its function, and what it does.
COMMANDS = {
    "prepare": ("data.cli", "main", "Make token files of text or a dataset."),
    "train": ("training.cli", "main", "Train a model of chosen parts."),
    "sample": ("sampling.cli", "main", "Sample from a model, in colour; score it by lm-evaluation-harness."),
    "sweep": ("search.cli", "run_experiments_main", "Run the experiments of a YAML or JSON file."),
    "search": ("search.cli", "hyperparam_search_main", "Improve a configuration greedily, gain per cost."),
    "inspect": ("analysis.cli", "inspect_main", "List checkpoints by validation loss."),
    "stats": ("analysis.cli", "stats_main", "Spread and extremes of weights and activations."),
    "softmax": ("analysis.cli", "softmax_main", "Plot what the softmax variants make of the same scores."),
    "hardware": ("hardware_cli", "main", "Count parameters, operations and state of a configuration."),
}

app = typer.Typer(
    help="Train and compare language models whose parts are chosen by name, and what they cost in hardware.",
    no_args_is_help=True,
)


add_commands(app, "hf_gradtools.nanogpt", COMMANDS)
