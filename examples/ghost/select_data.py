"""Selects the 5 % of a mixed corpus that a target task learns most from, and compares them with a random 5 %.

    python examples/ghost/select_data.py --model HuggingFaceTB/SmolLM2-135M \
        --corpus math=gsm8k.jsonl qa=boolq.jsonl reviews=reviews.jsonl --target math

As in LESS (arXiv 2402.04333): the gradients of all rows and of a few rows of the target are projected at the model's
weights, and the rows whose gradients point most where the target's do are selected. The model is fine-tuned on them
and, as often, on as many random rows; the loss on other rows of the target tells which was better. Rows of the target
are held out of its domain: none of them is in the corpus.
"""

from __future__ import annotations

import logging
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_gradtools.ghost.gradproj.projector import GradProjector
from hf_gradtools.ghost.gradproj.selection import select
from hf_gradtools.workflow.causal_lm import load_model, load_tokenizer, make_collator
from hf_gradtools.workflow.data import load_rows, number_rows
from hf_gradtools.workflow.tokenizing import RowFormat, tokenize_rows


@dataclass
class Arguments:
    """What to select from, for what, and how to judge it."""

    model: str = "HuggingFaceTB/SmolLM2-135M"
    corpus: list[str] = field(
        default_factory=lambda: ["math=openai/gsm8k:main", "qa=google/boolq", "reviews=stanfordnlp/imdb"],
        metadata={"help": "domains: name=Hub id or local file, of texts or of prompts and responses"},
    )
    target: str = field(default="math", metadata={"help": "the domain whose loss is to go down"})
    rows_per_domain: int = field(default=160, metadata={"help": "in the corpus"})
    target_rows: int = field(default=16, metadata={"help": "of the target, for the selection"})
    test_rows: int = field(default=64, metadata={"help": "of the target, for the loss"})
    fraction: float = field(default=0.05, metadata={"help": "of the corpus to select"})
    diversity: float = field(default=0.0, metadata={"help": "0 to 1: avoid rows that are like those selected before"})
    precondition: str = field(default="none", metadata={"help": "none or fisher"})
    reduce: str = field(default="mean", metadata={"help": "a row's score: mean or max over the target's rows"})
    proj_rank_total: int = 1024
    proj_layers: str = "all-linear"
    proj_seed: int = 0
    max_length: int = 128
    batch_size: int = 8
    epochs: float = 4.0
    learning_rate: float = 3e-4
    seeds: int = field(default=3, metadata={"help": "random selections; and runs with the selected rows"})
    output_dir: str | None = field(default=None, metadata={"help": "folder of the gradients; default a temporary one"})


def load_domains(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset, Dataset]:
    """The corpus, and the target's rows for selection and test; ids are `domain-number`."""
    held_out = args.target_rows + args.test_rows
    corpus, target = [], None
    for source in args.corpus:
        name, _, path = source.partition("=")
        rows = number_rows(load_rows(path).shuffle(seed=0))
        wanted = args.rows_per_domain + (held_out if name == args.target else 0)
        rows = rows.select(range(min(2 * wanted, len(rows))))  # some may have nothing to learn within max_length
        tokenized = tokenize_rows(rows, tokenizer, row_format_of(rows), args.max_length)
        tokenized = tokenized.map(lambda row, name=name: {"sample_id": f"{name}-{row['sample_id']}"})
        if len(tokenized) < wanted:
            print(f"{name}: {len(tokenized)} rows of the {wanted} wanted")
        if name == args.target:
            target = tokenized.select(range(held_out))
            tokenized = tokenized.select(range(held_out, len(tokenized)))
        corpus.append(tokenized.select(range(min(args.rows_per_domain, len(tokenized)))))
    if target is None:
        raise SystemExit(f"--target {args.target} is none of the domains of --corpus {' '.join(args.corpus)}")
    return (
        concatenate_datasets(corpus),
        target.select(range(args.target_rows)),
        target.select(range(args.target_rows, held_out)),
    )


def row_format_of(rows: Dataset) -> RowFormat:
    return RowFormat.detect([name for name in rows.column_names if name != "sample_id"])


def fine_tune(args: Arguments, tokenizer: PreTrainedTokenizerBase, rows: Dataset | None, test: Dataset, seed: int):
    """The loss on the test rows after training on `rows`, or before any training."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=seed,
            remove_unused_columns=False,
        )
        columns = ["input_ids", "labels"]
        trainer = Trainer(
            load_model(args.model, "float32"),
            training,
            train_dataset=None if rows is None else rows.select_columns(columns),
            data_collator=make_collator(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        if rows is not None:
            trainer.train()
        return trainer.evaluate(test.select_columns(columns))["eval_loss"]


def domains_of(rows: Dataset) -> str:
    counts = Counter(sample_id.rpartition("-")[0] for sample_id in rows["sample_id"])
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def describe(losses: list[float]) -> str:
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return f"{statistics.mean(losses):.4f} ± {spread:.4f}  ({', '.join(f'{loss:.4f}' for loss in losses)})"


def main(args: Arguments) -> None:
    logging.basicConfig(level=logging.ERROR)
    start = time.perf_counter()
    tokenizer = load_tokenizer(args.model)
    corpus, target, test = load_domains(args, tokenizer)
    print(f"corpus: {domains_of(corpus)}; target: {len(target)} rows to select by, {len(test)} to test on")

    layers = args.proj_layers if args.proj_layers == "all-linear" else args.proj_layers.split(",")
    projector = GradProjector(
        load_model(args.model, "float32"), layers=layers, proj_rank_total=args.proj_rank_total, seed=args.proj_seed
    )
    folder = args.output_dir or tempfile.mkdtemp()
    store = projector.project(corpus.remove_columns("text"), output_dir=folder, batch_size=args.batch_size)
    selected = select(
        store,
        target.remove_columns("text"),
        args.fraction,
        dataset=corpus,
        diversity=args.diversity,
        precondition=None if args.precondition == "none" else args.precondition,
        reduce=args.reduce,
    )
    del projector, store
    print(f"\nselected {len(selected)} rows of {len(corpus)}: {domains_of(selected)}; the best of them:")
    for row in selected.select(range(min(3, len(selected)))):
        print(f"  {row['score']:+.3f}  {row['sample_id']:12}  {' '.join(row['text'].split())[:80]}")

    before = fine_tune(args, tokenizer, None, test, 0)
    ours, others = [], []
    for seed in range(args.seeds):
        ours.append(fine_tune(args, tokenizer, selected, test, seed))
        chosen = random.Random(seed).sample(range(len(corpus)), len(selected))
        others.append(fine_tune(args, tokenizer, corpus.select(chosen), test, seed))
    print(f"\nloss on {len(test)} held-out rows of {args.target} (before: {before:.4f})")
    print(f"  after the selected {args.fraction:.0%}   {describe(ours)}")
    print(f"  after a random {args.fraction:.0%}     {describe(others)}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
