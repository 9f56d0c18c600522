"""Teaches a model to follow instructions, on Dolly.

python examples/grit/train_dolly.py --qlora --bf16 --output_dir out/dolly
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common import fine_tune
from transformers import HfArgumentParser

from hf_gradtools.grit.train_config import GritTrainConfig


@dataclass
class Arguments(GritTrainConfig):
    """All options of `GritTrainConfig`; the dataset has columns instruction, context (may be empty) and response."""

    model: str = "meta-llama/Llama-3.2-3B"
    dataset: str = field(
        default="databricks/databricks-dolly-15k", metadata={"help": "Hub id or local file with the same columns"}
    )
    output_dir: str = "out/grit_dolly"


def format_row(row: dict) -> dict[str, str]:
    given = f"Context: {row['context']}\n\n" if row["context"] else ""
    return {"prompt": f"{given}Instruction: {row['instruction']}\n\nResponse:", "completion": row["response"]}


if __name__ == "__main__":
    fine_tune(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0], format_row)
