"""Tokens per second of greedy generation up to a context of 256 tokens, from a prompt of 16.

```
python benchmarks/nanogpt_generate.py [--shapes E128 E256] [--batches 1 8] [--rounds 8] [--output table.md]
```

Ours and transformers' GPT-2 through `generate()` with its cache; nanoGPT's own loop, which has none; litgpt's model
with its cache in a bare loop. Random weights, and no token ends a text, so all write as many. CPU time of one process
whose variants take turns; the ratio is the median over the rounds of the ratio to GPT-2 in the same round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import Variant, environment, markdown_table, time_interleaved
from nanogpt_models import HOW_TO_LITGPT, Shape, bare, has_litgpt, hf_gpt2, litgpt, malloc_settings, ours
from torch import Tensor, nn


CONTEXT, PROMPT = 256, 16
SHAPES = {"E128": Shape(128, 4, CONTEXT, 1), "E256": Shape(256, 4, CONTEXT, 1)}
GPT2 = "GPT2LMHeadModel.generate"
Writer = Callable[[], Tensor]


def through_generate(model: nn.Module, ids: Tensor) -> Writer:
    """As users call it. The mask is given, so that nothing is guessed, and no token ends the text."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    options = {"max_length": CONTEXT, "do_sample": False, "use_cache": True}
    return partial(model.eval().generate, ids, attention_mask=torch.ones_like(ids), **options)


def without_cache(model: nn.Module, ids: Tensor) -> Writer:
    return partial(model.eval().generate, ids, CONTEXT - ids.shape[1])


def litgpt_writer(model: nn.Module, ids: Tensor) -> Writer:
    """What litgpt's own generation does for a token, for a batch and without its checks for stop words."""

    @torch.inference_mode()
    def write() -> Tensor:
        model.set_kv_cache(batch_size=ids.shape[0], max_seq_length=CONTEXT)
        out, new, start = [ids], ids, 0
        for end in range(ids.shape[1], CONTEXT):
            logits = model(new, torch.arange(start, end), input_pos_maxp1=end)
            new, start = logits[:, -1].argmax(-1, keepdim=True), end
            out.append(new)
        return torch.cat(out, dim=1)

    return write


def writers(shape: Shape, ids: Tensor) -> dict[str, Writer]:
    result = {
        GPT2: through_generate(hf_gpt2(shape), ids),
        "**ours**, absolute positions": through_generate(ours(shape, "absolute"), ids),
        "**ours**, rotary": through_generate(ours(shape, "rotary"), ids),
        "bare nanoGPT (no cache)": without_cache(bare(shape), ids),
    }
    if has_litgpt():
        result["litgpt's GPT (rotary), bare loop"] = litgpt_writer(litgpt(shape).eval(), ids)
    return result


def measure(shape: Shape, batch: int, rounds: int) -> str:
    ids = torch.randint(shape.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    every = writers(shape, ids)
    for name, write in every.items():  # warm, and all write the same number of tokens
        assert write().shape == (batch, CONTEXT), f"{name} stopped early"
    times = time_interleaved({name: Variant(write) for name, write in every.items()}, rounds)
    tokens = batch * (CONTEXT - PROMPT)
    rows = [
        [
            name,
            f"{tokens / statistics.median(times[name].cpu):.0f}",
            f"{1 / times[name].ratio(times[GPT2], 'cpu'):.2f}",
            f"{1 / times[name].ratio(times[GPT2], 'wall'):.2f}",
        ]
        for name in every
    ]
    head = ["greedy, with cache", "tokens per CPU second", "× GPT-2", "× GPT-2 by wall time"]
    return f"E{shape.n_embd} L{shape.n_layer} H{shape.n_head}, batch {batch}\n\n{markdown_table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = []
    for name in args.shapes:
        for batch in args.batches:
            tables.append(measure(SHAPES[name], batch, args.rounds))
            print(f"{tables[-1]}\n", flush=True)
    notes = [f"{environment()}; {malloc_settings()}", *([] if has_litgpt() else [HOW_TO_LITGPT])]
    print("\n\n".join(notes))
    if args.output:
        args.output.write_text("\n\n".join([*tables, *notes]) + "\n")


if __name__ == "__main__":
    main()
