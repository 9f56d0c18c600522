"""Pretrains a small language model on several domains of text and tells which domains help which.

Every training block is scored, step by step, against validation blocks of each domain; see README.md beside this file.
"""

import argparse
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_gradtools import GhostDotProdCallback
from hf_gradtools.ghost.stored_run import ROWS, TEXTS, StoredRun
from hf_gradtools.workflow.data import load_rows, write_texts
from hf_gradtools.workflow.tokenizing import RowFormat


ARCHITECTURES = {  # layers, width, heads
    "gpt2-tiny": (2, 64, 2),
    "gpt2-mini": (4, 256, 4),
    "gpt2-small": (12, 768, 12),
    "llama-tiny": (2, 64, 2),
    "llama-mini": (4, 256, 4),
    "llama-small": (12, 768, 12),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--method", choices=["GradDotProd", "Regular"], default="GradDotProd", help="Regular: plain training")
    add(
        "--architecture",
        choices=list(ARCHITECTURES),
        default="gpt2-mini",
        help="of the model, which starts from scratch",
    )
    add("--dataset", nargs="+", default=["monology/pile-uncopyrighted"], help="a Hub id, or files: name=path[:column]")
    add("--text_column", default="text", help="of a Hub dataset")
    add("--domain_column", default="meta.pile_set_name", help="of a Hub dataset; a dot goes into a nested column")
    add("--num_documents", type=int, default=5000, help="read from a Hub dataset")
    add("--max_domains", type=int, default=6, help="those with most text are taken")
    add("--val_domain", help="score against this domain only (default: against each)")
    add("--tokenizer", default="openai-community/gpt2", help="Hub id or folder")
    add("--block_size", type=int, default=128, help="tokens of a sample")
    add("--batch_size", type=int, default=16, help="blocks of a step")
    add("--val_batch_size", type=int, default=8, help="validation blocks of each domain behind the scores of a step")
    add("--val_blocks", type=int, default=32, help="blocks of each domain held out for validation")
    add("--learning_rate", type=float, default=1e-3, help="peak")
    add("--max_steps", type=int, default=200, help="optimizer steps")
    add("--dot_prod_save_interval", type=int, default=1, help="score every so many steps")
    add("--output_dir", default="out/graddotprod_lm", help="folder for scores and report")
    add("--seed", type=int, default=0, help="of weights and data order")
    return parser.parse_args()


def read_domains(args: argparse.Namespace) -> dict[str, Iterable[str]]:
    """Documents by domain."""
    if "=" in args.dataset[0]:
        named = [source.partition("=") for source in args.dataset]
        return {name: read_file(source) for name, _, source in named}
    domains: dict[str, list[str]] = {}
    for row in load_dataset(args.dataset[0], split="train", streaming=True).take(args.num_documents):
        domain = row
        for key in args.domain_column.split("."):
            domain = domain[key]
        domains.setdefault(domain, []).append(row[args.text_column])
    largest = sorted(domains, key=lambda name: -sum(map(len, domains[name])))
    return {name: domains[name] for name in largest[: args.max_domains]}


def read_file(source: str) -> Iterator[str]:
    """A text file is one document; of other files each row is one, in the column named or the usual ones."""
    path, _, column = (source, "", "") if Path(source).exists() else source.rpartition(":")
    if path.endswith(".txt"):
        yield Path(path).read_text()
        return
    rows = load_rows(path or column)
    row_format = RowFormat.detect(rows.column_names, text=column if path else None)
    yield from map(row_format.readable, rows)


def make_blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int, most: int) -> list[list[int]]:
    """Cuts the documents, joined by end-of-text tokens, into at most `most` blocks of `size` tokens."""
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) >= 2 * most * size:
            break
    blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
    return random.sample(blocks, min(most, len(blocks)))


def make_datasets(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, Dataset]]:
    """Training blocks, as many of each domain, and validation blocks by domain."""
    domains = read_domains(args)
    wanted = args.val_blocks + -(-args.max_steps * args.batch_size // len(domains))
    blocks = {name: make_blocks(texts, tokenizer, args.block_size, wanted) for name, texts in domains.items()}
    for name, found in blocks.items():
        if len(found) <= args.val_blocks:
            raise SystemExit(
                f"domain {name!r} has {len(found)} blocks, too few to hold out --val_blocks {args.val_blocks}. "
                "Add text (--num_documents), or lower --val_blocks, --block_size or --max_domains."
            )
    rows = [
        {"sample_id": f"{name}-{i}", "text": tokenizer.decode(block), "input_ids": block, "labels": block}
        for name, found in blocks.items()
        for i, block in enumerate(found[args.val_blocks :])
    ]
    validation = {
        name: Dataset.from_list([{"input_ids": block, "labels": block} for block in found[: args.val_blocks]])
        for name, found in blocks.items()
    }
    return Dataset.from_list(rows), validation


def make_model(architecture: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    layers, width, heads = ARCHITECTURES[architecture]
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if architecture.startswith("gpt2"):
        shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": block_size}
        dropout = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
        config = GPT2Config(vocab_size=len(tokenizer), loss_type="ForCausalLM", **shape, **dropout, **ends)
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        max_position_embeddings=block_size,
        tie_word_embeddings=True,
        **ends,
    )
    return LlamaForCausalLM(config)


def print_table(rows: Dataset, domains: list[str], targets: list[str]) -> None:
    """Mean value of the samples of each domain (down) for the validation loss of each target (across)."""
    table = rows.to_pandas()
    table["domain"] = table["sample_id"].str.rpartition("-")[0]
    columns = [column for column in table.columns if column.partition("/")[0] == "value"]
    means = table.groupby("domain")[columns].mean().reindex(domains) * 1e6
    width = max(map(len, domains)) + 2
    print("\nMean change of the validation loss (x 1e-6) by one training block of the domain on the left.")
    print("Negative helps; * helps most.\n")
    print(" " * width + " ".join(f"{target:>{width}}" for target in targets))
    for domain in domains:
        best = ["*" if means[column].idxmin() == domain else " " for column in columns]
        cells = [f"{means[column][domain]:>{width}.1f}{mark}" for column, mark in zip(columns, best, strict=True)]
        print(f"{domain:<{width}}" + "".join(cells))


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.model_max_length = 10**9  # documents are cut into blocks
    train, validation = make_datasets(args, tokenizer)
    if args.val_domain and args.val_domain not in validation:
        raise SystemExit(f"--val_domain {args.val_domain} is none of the domains {', '.join(validation)}")
    model = make_model(args.architecture, tokenizer, args.block_size)
    size = f"{model.num_parameters() / 1e6:.1f} M parameters"
    print(f"{args.architecture}: {size}; {len(train)} blocks of {', '.join(validation)}")

    out = Path(args.output_dir)
    targets = {args.val_domain: validation[args.val_domain]} if args.val_domain else validation
    callback = GhostDotProdCallback(
        targets,
        output_dir=str(out / ROWS),
        val_batch_size=args.val_batch_size,
        every_steps=args.dot_prod_save_interval,
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(out),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.max_steps // 20,
            seed=args.seed,
            logging_steps=max(args.max_steps // 5, 1),
            save_strategy="no",
            dataloader_pin_memory=torch.accelerator.is_available(),
            remove_unused_columns=False,
        ),
        train_dataset=train.remove_columns("text"),
        callbacks=[callback] if args.method == "GradDotProd" else [],
    )
    start = time.perf_counter()
    trainer.train()
    print(f"\n{(time.perf_counter() - start) / args.max_steps:.2f} s per step")
    losses = {name: trainer.evaluate(rows)["eval_loss"] for name, rows in validation.items()}
    print("validation loss: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    if args.method == "GradDotProd":
        write_texts(train, out / TEXTS)
        stored = StoredRun.open(out)
        print_table(stored.rows, list(validation), list(targets))
        print(f"\nreport: {stored.write_report()}")


if __name__ == "__main__":
    main()
