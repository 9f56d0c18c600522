"""Projects the gradients of a corpus at one checkpoint into a store; see README.md beside this file."""

import argparse
import time
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_gradtools.ghost.gradproj.projector import GradProjector
from hf_gradtools.ghost.models import load_any_model
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


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", help="checkpoint: Hub id or folder of a causal LM")
    add("--architecture", choices=list(ARCHITECTURES), default="gpt2-mini", help="without --model: random weights")
    add("--tokenizer", help="Hub id or folder; default that of --model, or openai-community/gpt2")
    add("--dtype", default="float32", help="of the weights: float32, bfloat16 or auto")
    add("--dataset", default="Salesforce/wikitext:wikitext-2-raw-v1", help="Hub id (id:config) or local file")
    add("--split", help="such as train[:1000]")
    add("--text_column", help="default by the usual names")
    add("--block_size", type=int, default=128, help="tokens of a sample")
    add("--max_samples", type=int, default=512, help="blocks cut from the corpus")
    add("--batch_size", type=int, default=16, help="blocks of a forward pass")
    add("--proj_layers", default="all-linear", help="all-linear, or patterns of layer names: attn.c_attn,mlp.c_fc")
    add("--proj_rank_total", type=int, default=1024, help="numbers stored per sample")
    add("--proj_seed", type=int, default=0, help="of the projection")
    return parser


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model or "openai-community/gpt2")
    tokenizer.model_max_length = 10**9  # documents are cut into blocks
    return tokenizer


def load_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The checkpoint, or a model of the architecture with random weights."""
    if args.model:
        return load_any_model(args.model, args.dtype)
    set_seed(0)
    depth, width, heads = ARCHITECTURES[args.architecture]
    ends = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    if args.architecture.startswith("gpt2"):
        shape = {"n_layer": depth, "n_embd": width, "n_head": heads, "n_positions": args.block_size}
        return GPT2LMHeadModel(GPT2Config(loss_type="ForCausalLM", **shape, **ends))
    shape = {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads}
    return LlamaForCausalLM(LlamaConfig(intermediate_size=4 * width, tie_word_embeddings=True, **shape, **ends))


def make_blocks(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Cuts the documents, joined by end-of-text tokens, into blocks: sample_id, text, input_ids, labels."""
    rows = load_rows(args.dataset, args.split)
    row_format = RowFormat.detect(rows.column_names, text=args.text_column)
    tokens: list[int] = []
    for row in rows:
        if text := row_format.readable(row).strip():
            tokens += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) >= args.max_samples * args.block_size:
            break
    starts = range(0, len(tokens) - args.block_size + 1, args.block_size)
    blocks = [tokens[i : i + args.block_size] for i in starts][: args.max_samples]
    if not blocks:
        raise SystemExit(f"{args.dataset} has {len(tokens)} tokens, less than one block; lower --block_size")
    texts = [tokenizer.decode(block) for block in blocks]
    return Dataset.from_dict({"sample_id": range(len(blocks)), "text": texts, "input_ids": blocks, "labels": blocks})


def pattern_of(args: argparse.Namespace) -> str | list[str]:
    return args.proj_layers if args.proj_layers == "all-linear" else args.proj_layers.split(",")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", default="out/gradproj_lm", help="folder of the store and the texts")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args)
    model, blocks = load_model(args, tokenizer), make_blocks(args, tokenizer)
    projector = GradProjector(
        model, layers=pattern_of(args), proj_rank_total=args.proj_rank_total, seed=args.proj_seed
    )
    folder = Path(args.output_dir)
    start = time.perf_counter()
    store = projector.project(
        blocks.remove_columns("text"), output_dir=folder / "gradients", batch_size=args.batch_size
    )
    seconds = time.perf_counter() - start
    write_texts(blocks, folder / "samples.jsonl")
    info = store.info()
    print(f"\n{len(store)} samples of {args.block_size} tokens, {info['layers']} layers, {store.dim} numbers each")
    print(f"{info['bytes_per_sample']:.0f} bytes per sample, {len(store) / seconds:.1f} samples per second")
    hits = store.search(store.rows([0])[0], k=min(4, len(store)), metric="cosine")
    print("\nnearest to sample 0:")
    for hit in hits:
        print(f"  {hit['score']:+.3f}  {hit['sample_id']:>5}  {' '.join(blocks[hit['row']]['text'].split())[:80]}")
    print(f"\nstore: {store.path}")


if __name__ == "__main__":
    main()
