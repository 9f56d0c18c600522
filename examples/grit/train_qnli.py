"""Teaches a model whether a sentence answers a question, on QNLI, and tells its accuracy on held-out rows.

python examples/grit/train_qnli.py --qlora --bf16 --val 0.02 --output_dir out/qnli
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common import accuracy, fine_tune
from transformers import HfArgumentParser

from hf_gradtools.grit.train_config import GritTrainConfig


@dataclass
class Arguments(GritTrainConfig):
    """All options of `GritTrainConfig`; the dataset has columns question, sentence and label (0 if it does answer)."""

    model: str = "meta-llama/Llama-3.2-3B"
    dataset: str = field(default="nyu-mll/glue:qnli", metadata={"help": "Hub id or local file with the same columns"})
    output_dir: str = "out/grit_qnli"


def format_row(row: dict) -> dict[str, str]:
    asked = f"Question: {row['question']}\n\nSentence: {row['sentence']}"
    return {
        "prompt": f"{asked}\n\nDoes the sentence answer the question? Answer yes or no:",
        "completion": ["yes", "no"][row["label"]],
    }


if __name__ == "__main__":
    run = fine_tune(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0], format_row)
    print(f"accuracy    {accuracy(run, ['yes', 'no']):.3f} on held-out rows")
