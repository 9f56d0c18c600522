"""Teaches a model to answer yes or no from a passage, on BoolQ, and tells its accuracy on held-out rows.

python examples/grit/train_boolq.py --qlora --bf16 --output_dir out/boolq
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common import accuracy, fine_tune
from transformers import HfArgumentParser

from hf_gradtools.grit.train_config import GritTrainConfig


@dataclass
class Arguments(GritTrainConfig):
    """All options of `GritTrainConfig`; the dataset has columns passage, question and answer (true or false)."""

    model: str = "meta-llama/Llama-3.2-3B"
    dataset: str = field(default="google/boolq", metadata={"help": "Hub id or local file with the same columns"})
    output_dir: str = "out/grit_boolq"


def format_row(row: dict) -> dict[str, str]:
    prompt = f"Passage: {row['passage']}\n\nQuestion: {row['question']}?\n\nAnswer yes or no:"
    return {"prompt": prompt, "completion": "yes" if row["answer"] else "no"}


if __name__ == "__main__":
    run = fine_tune(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0], format_row)
    print(f"accuracy    {accuracy(run, ['yes', 'no']):.3f} on held-out rows")
