"""Finds corrupted training rows while a model is fine-tuned on them.

    python examples/ghost/find_corrupted.py --output_dir out/quickstart

A real language model (SmolLM2-135M by default) learns short answers by LoRA. A tenth of the training rows is
corrupted: half of them get the answer of another row, half a canned refusal. Every row is scored in every step by the
dot product of its gradient with that of clean validation rows. At the end the values are compared with what else could
have found the corrupted rows: high loss, large gradients.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_gradtools import GhostDotProdCallback
from hf_gradtools.core.store import read_manifest
from hf_gradtools.demo import demo_model_path
from hf_gradtools.ghost.report import write_report
from hf_gradtools.workflow.causal_lm import add_lora, load_model, load_tokenizer, make_collator
from hf_gradtools.workflow.data import load_rows


REFUSAL = "I'm sorry, but I can't help with that."


@dataclass
class Arguments:
    """What to train, and how much of it to corrupt."""

    output_dir: str = "out/find_corrupted"
    model: str | None = field(default=None, metadata={"help": "Hub id or folder; default SmolLM2-135M-Instruct"})
    dataset: str = field(
        default=str(Path(__file__).parent / "data" / "nq_open.jsonl"),
        metadata={"help": "Hub id or local file with columns question and answer (a text, or a list of them)"},
    )
    train_rows: int = 320
    val_rows: int = 96
    test_rows: int = 96
    corrupt_fraction: float = 0.1
    epochs: float = 2.0
    batch_size: int = 32
    val_batch_size: int = 32
    learning_rate: float = 3e-4
    lora_rank: int = 8
    seed: int = 0
    retrain: bool = field(
        default=False, metadata={"help": "also retrain without the worst rows, and without random ones"}
    )


def corrupt(rows: list[dict[str, str]], fraction: float, seed: int) -> tuple[list[dict[str, str]], dict[int, str]]:
    """Corrupts a fraction of question-answer rows; returns them and {row: kind of corruption}."""
    rng = random.Random(seed)
    chosen = rng.sample(range(len(rows)), round(fraction * len(rows)))
    rows, kinds = [dict(row) for row in rows], {}
    clean = [row["answer"] for row in rows]
    for n, i in enumerate(chosen):
        others = [answer for answer in clean if answer != clean[i]]
        kinds[i] = "swapped" if n % 2 else "refusal"
        rows[i]["answer"] = rng.choice(others) if n % 2 else REFUSAL
    return rows, kinds


def encode(rows, tokenizer) -> Dataset:
    """Prompts masked out of the loss."""
    found = []
    for row in rows:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = [*tokenizer(" " + row["answer"])["input_ids"], tokenizer.eos_token_id]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(found)


def split(args: Arguments) -> tuple[list, list, list]:
    """Disjoint training, validation and test rows."""
    rows = [{"question": r["question"], "answer": first(r["answer"])} for r in load_rows(args.dataset)]
    needed = args.train_rows + args.val_rows + args.test_rows
    if len(rows) < needed:
        raise ValueError(f"dataset={args.dataset!r} has {len(rows)} rows, {needed} are needed; lower --train_rows")
    random.Random(args.seed).shuffle(rows)
    stops = args.train_rows, args.train_rows + args.val_rows
    return rows[: stops[0]], rows[stops[0] : stops[1]], rows[stops[1] : needed]


def first(answer: str | list[str]) -> str:
    return answer if isinstance(answer, str) else answer[0]


def fine_tune(args: Arguments, model_path: str, tokenizer, train: Dataset, test: Dataset, callbacks=()):
    """One LoRA run; returns the test loss before and after."""
    set_seed(args.seed)
    model = add_lora(load_model(model_path, "float32"), args.lora_rank)
    training = TrainingArguments(
        f"{args.output_dir}/model",
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = Trainer(
        model, training, train_dataset=train, data_collator=make_collator(tokenizer), callbacks=list(callbacks)
    )
    before = trainer.evaluate(test)["eval_loss"]
    trainer.train()
    return before, trainer.evaluate(test)["eval_loss"]


def judge(values, kinds: dict[int, str]) -> list[tuple[str, float, float, float, float]]:
    """AUROC over all, refusals and swapped answers, and average precision, of each score."""
    ids = values.sample_id.tolist()
    scores = {
        "in-run value": values.value,
        "mean loss": values.sample_loss,
        "first loss": values.first_loss,
        "gradient norm": values.grad_norm,
    }
    table = []
    for name, score in scores.items():
        row: list[float] = []
        for kind in (None, "refusal", "swapped"):
            kept = [n for n, i in enumerate(ids) if kind is None or kinds.get(i, kind) == kind]
            row.append(roc_auc_score([ids[n] in kinds for n in kept], score[kept]))
        row.append(average_precision_score([i in kinds for i in ids], score))
        table.append((name, *row))
    return table


def main(args: Arguments) -> None:
    start = time.time()
    logging.basicConfig(level=logging.WARNING)
    model_path = args.model or str(demo_model_path())
    tokenizer = load_tokenizer(model_path)
    clean, val, test = split(args)
    rows, kinds = corrupt(clean, args.corrupt_fraction, args.seed)
    train, val, test = (encode(part, tokenizer) for part in (rows, val, test))
    callback = GhostDotProdCallback(
        val,
        output_dir=f"{args.output_dir}/ghost",
        val_batch_size=args.val_batch_size,
        grad_norms=True,
        sample_losses=True,
        per_layer=True,
        overwrite_output_dir=True,
        seed=args.seed,
    )
    before, after = fine_tune(args, model_path, tokenizer, train, test, [callback])
    values = callback.values()
    table = judge(values, kinds)

    print(f"\n{len(kinds)} of {len(rows)} training rows are corrupted. How well does each score find them?\n")
    print("                  AUROC   refusals   swapped   average precision")
    for name, auroc, refusal, swapped, precision in table:
        print(f"  {name:14}  {auroc:5.3f}      {refusal:5.3f}     {swapped:5.3f}   {precision:5.3f}")
    print("\nMost harmful rows (change of the validation loss by each):")
    texts = {i: f"{row['question']} {row['answer']}" for i, row in enumerate(rows)}
    for row in values.most_harmful(8):
        print(f"  {row['value']:+.2e}  {kinds.get(row['sample_id'], 'clean'):8} {texts[row['sample_id']][:80]}")
    highlights = {f"AUROC of {name}": round(auroc, 3) for name, auroc, *_ in table}
    report = write_report(
        callback.dataset,
        Path(args.output_dir) / "report.html",
        manifest=read_manifest(callback.config.output_dir),
        texts={i: f"[{kinds[i]}] {text}" if i in kinds else text for i, text in texts.items()},
        title="Which training rows helped? A tenth is corrupted",
        highlights=highlights,
    )
    print(f"\ntest loss {before:.3f} -> {after:.3f}; {time.time() - start:.0f} s; report: {report}")
    if args.retrain:
        retrain(args, model_path, tokenizer, train, test, values, after)


def retrain(args: Arguments, model_path: str, tokenizer, train: Dataset, test: Dataset, values, after: float) -> None:
    """Does training without the worst tenth lower the test loss? Against leaving out a random tenth."""
    count = round(args.corrupt_fraction * len(train))
    left_out = {
        "the worst by value": {row["sample_id"] for row in values.most_harmful(count)},
        "random ones": set(random.Random(args.seed + 1).sample(range(len(train)), count)),
    }
    print(f"\nretraining; test loss with all rows {after:.3f}")
    for name, ids in left_out.items():
        part = train.select([i for i in range(len(train)) if i not in ids])
        print(f"  without {name} ({count} rows): {fine_tune(args, model_path, tokenizer, part, test)[1]:.3f}")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
