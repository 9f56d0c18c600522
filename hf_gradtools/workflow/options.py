"""Options that every workflow has. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


DTYPES = (None, "auto", "float32", "bfloat16", "float16")


@dataclass
class DataOptions:
    """A causal LM, its data, and where results go.

    Args:
        model: Hub id or folder.
        dataset: training rows: a Hub id (`id` or `id:config`), a `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file,
            or a folder made by `save_to_disk`.
        output_dir: folder of everything the run writes.
        split: split of `dataset`, default "train".
        text_column: column to train on; default by the usual names, as for the next two.
        prompt_column: column, or several separated by commas, that the model is given.
        response_column: column that it learns to answer.
        max_length: tokens kept of a row.
        batch_size: rows in one forward on each device.
        seed: of everything random.
        dtype: of the weights.

    Raises:
        ValueError: a number is out of range.
    """

    free: ClassVar[set[str]] = {"output_dir"}

    model: str
    dataset: str
    output_dir: str
    split: str | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    max_length: int = 512
    batch_size: int = 8
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        self.check_least(max_length=2, batch_size=1)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown. Pass one of {', '.join(filter(None, DTYPES))}.")

    def check_least(self, **least: int) -> None:
        """ValueError if an option is below the number given for it; one that is None is not."""
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}.")

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the one it continues."""
        return {name: value for name, value in asdict(self).items() if name not in self.free}


@dataclass
class RunOptions(DataOptions):
    """A causal LM, its data, and how long it trains.

    Everything of [`DataOptions`] applies.

    Args:
        val: validation rows: a dataset as `dataset`, or a number of training rows to hold out, or their share.
        val_split: split of a validation dataset, default "train".
        epochs: passes over the training rows.
        max_steps: optimizer steps, overriding `epochs` unless -1.
        gradient_accumulation_steps: forwards in one optimizer step.
        seed: of adapters, data order, and the rows held out.
        bf16: compute in bfloat16.
        save_steps: optimizer steps between checkpoints.
        report_to: where Trainer logs to, such as "tensorboard".
        resume: continue the run in `output_dir` from its last checkpoint.

    Raises:
        ValueError: a number is out of range.
    """

    free: ClassVar[set[str]] = {"output_dir", "epochs", "max_steps", "save_steps", "report_to", "resume"}

    val: str = "0.1"
    val_split: str | None = None
    epochs: float = 1.0
    max_steps: int = -1
    gradient_accumulation_steps: int = 1
    bf16: bool = False
    save_steps: int = 500
    report_to: str = "none"
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(gradient_accumulation_steps=1, save_steps=1)
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"epochs={self.epochs:g} trains nothing. Pass a positive number, or max_steps=.")
