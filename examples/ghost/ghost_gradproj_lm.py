"""Projects the gradients of a corpus at a language model's weights, and shows the samples nearest to a text.

By default a small GPT-2 over bytes is trained for a moment on short questions and answers: nothing is downloaded.

    python examples/ghost/ghost_gradproj_lm.py --proj_layers "attn.c_attn,mlp.c_fc" --query "Who wrote the book?"
    python examples/ghost/ghost_gradproj_lm.py --model HuggingFaceTB/SmolLM2-135M --proj_layers "mlp" \
        --dataset rows.jsonl --query "some text"
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, set_seed

from hf_gradtools.ghost.gradproj.batches import pad_rows
from hf_gradtools.ghost.gradproj.projector import GradProjector
from hf_gradtools.ghost.models import load_any_model
from hf_gradtools.workflow.causal_lm import load_tokenizer
from hf_gradtools.workflow.data import load_rows
from hf_gradtools.workflow.tokenizing import RowFormat


QUERIES = ["Who wrote the book? William Shakespeare", "Where is the capital of France? Paris"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hub id or folder of a causal LM; default a small GPT-2 over bytes, trained here")
    add("--train_steps", type=int, default=100, help="of that small GPT-2")
    add(
        "--dataset",
        default=str(Path(__file__).parent / "data" / "nq_open.jsonl"),
        help="Hub id or local file: text, or prompts and responses, which are joined",
    )
    add("--query", nargs="+", default=QUERIES, help="texts")
    add("--max_samples", type=int, default=320, help="rows taken of the dataset")
    add("--max_length", type=int, default=96, help="tokens of a sample")
    add("--batch_size", type=int, default=16, help="samples of a forward pass")
    add("--proj_layers", default="attn.c_attn,mlp.c_fc", help="patterns of layer names, or all-linear")
    add("--proj_rank_total", type=int, default=1024, help="numbers stored per sample")
    add("--proj_seed", type=int, default=0, help="of the projection")
    add("--metric", choices=["cosine", "dot"], default="cosine")
    add("--top_k", type=int, default=5, help="samples shown for each query")
    add("--output_dir", help="folder of the store; default a temporary one")
    return parser.parse_args()


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def encode(texts: list[str], to_ids: Callable[[str], list[int]], length: int) -> Dataset:
    ids = [to_ids(text)[:length] for text in texts]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def train_small_model(rows: Dataset, length: int, steps: int) -> PreTrainedModel:
    """A GPT-2 of two layers over bytes."""
    shape = {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": length}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **shape)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model(**pad_rows([rows[i] for i in random.choices(range(len(rows)), k=16)])).loss
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f} per byte")
    return model


def main() -> None:
    args = parse_arguments()
    set_seed(0)
    table = load_rows(args.dataset)
    table = table.select(range(min(args.max_samples, len(table))))
    row_format = RowFormat.detect(table.column_names)
    texts = [row_format.readable(row).replace("\n\n", " ") for row in table]
    to_ids = bytes_of
    if args.model:
        tokenizer = load_tokenizer(args.model)
        to_ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    rows = encode(texts, to_ids, args.max_length)
    model = load_any_model(args.model) if args.model else train_small_model(rows, args.max_length, args.train_steps)

    layers = args.proj_layers if args.proj_layers == "all-linear" else args.proj_layers.split(",")
    projector = GradProjector(model, layers=layers, proj_rank_total=args.proj_rank_total, seed=args.proj_seed)
    folder = args.output_dir or tempfile.mkdtemp()
    store = projector.project(rows, output_dir=folder, batch_size=args.batch_size)
    weights = sum(p.numel() for layer in projector.layers for p in layer.parameters.values())
    where = f"the {weights:,} weights of {len(projector.layers)} layers"
    print(f"\n{len(store)} samples, {store.dim} numbers each for {where}")

    queries = encode(args.query, to_ids, args.max_length)
    hits = store.search(queries, k=min(args.top_k, len(store)), metric=args.metric)
    dots = projector.layer_dots(queries, rows.select(hits["row"]))
    for number, query in enumerate(args.query):
        print(f"\n{query}")
        for place, hit in enumerate(hits):
            if hit["query"] == number:
                strongest = max(dots, key=lambda name: dots[name][number, place])  # noqa: B023 - used at once
                print(f"  {hit['score']:+.3f}  {texts[hit['row']][:70]:70}  most in {strongest}")


if __name__ == "__main__":
    main()
