"""Teaches a model to reason through arithmetic, on GSM8K.

python examples/grit/train_gsm8k.py --qlora --bf16 --output_dir out/gsm8k
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common import fine_tune
from transformers import HfArgumentParser

from hf_gradtools.grit.train_config import GritTrainConfig


@dataclass
class Arguments(GritTrainConfig):
    """All options of `GritTrainConfig`; the dataset has columns question and answer."""

    model: str = "meta-llama/Llama-3.2-3B"
    dataset: str = field(default="openai/gsm8k:main", metadata={"help": "Hub id or local file with the same columns"})
    output_dir: str = "out/grit_gsm8k"


def format_row(row: dict) -> dict[str, str]:
    return {"prompt": f"Question: {row['question']}\n\nAnswer:", "completion": row["answer"]}


if __name__ == "__main__":
    fine_tune(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0], format_row)
