"""`hf-gradtools gradmem`: each command hands its words to a parser of its own, with that workflow's flags alone.

The functions behind `train` also stand behind `examples/gradmem/run_*.py`.
"""

from __future__ import annotations

import typer

from hf_gradtools.workflow.terminal import add_commands


# Command: its module, its function, and what it does.
COMMANDS = {
    "data": ("kv_retrieval.cli", "main", "Make a dataset of key-value retrieval."),
    "train": ("training.cli", "train_main", "Train a model that writes contexts to a memory by gradient steps."),
    "eval": ("training.cli", "eval_main", "Evaluate a trained model, by teacher forcing and by generation."),
    "plot": ("training.cli", "plot_main", "Compare results by the number of pairs; what an answer costs."),
}

gradmem_app = typer.Typer(
    help="Train language models that write a context to a small memory by gradient steps, and answer from it.",
    no_args_is_help=True,
)

add_commands(gradmem_app, "hf_gradtools.gradmem", COMMANDS)
