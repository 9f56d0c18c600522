"""Teaches a model to follow instructions, on Alpaca.

python examples/grit/train_alpaca.py --qlora --bf16 --output_dir out/alpaca
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common import fine_tune
from transformers import HfArgumentParser

from hf_gradtools.grit.train_config import GritTrainConfig


@dataclass
class Arguments(GritTrainConfig):
    """All options of `GritTrainConfig`; the dataset has columns instruction, input (may be empty) and output."""

    model: str = "meta-llama/Llama-3.2-3B"
    dataset: str = field(default="tatsu-lab/alpaca", metadata={"help": "Hub id or local file with the same columns"})
    output_dir: str = "out/grit_alpaca"


def format_row(row: dict) -> dict[str, str]:
    given = f"\n\nInput: {row['input']}" if row["input"] else ""
    return {"prompt": f"Instruction: {row['instruction']}{given}\n\nResponse:", "completion": row["output"]}


if __name__ == "__main__":
    fine_tune(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0], format_row)
