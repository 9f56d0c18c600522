"""Teaches a pretrained language model to write facts into a memory, writes some, and saves the memory.

    python examples/gradmem/write_facts.py --model path/or/hub-id --out out/facts
    python examples/gradmem/answer_from_memory.py out/facts "Lily has a"

A pretrained model cannot read a memory that gradient steps have changed: it learns to here, on sentences such as "Tom
has a red ball.", by LoRA adapters, or with `--frozen` by adapters that are there for writing alone. The sentences of
one name and one colour in four are kept out of training; how many of these the model answers is what is printed, and
as a check how many with the memory of other facts.

It takes time: stories15M, after 150 steps of 8 contexts, answers 0.50 of them (0.09 from other facts; a guess would be
0.125), that is one fact of the two in a context. Key-value retrieval stays there for a while, too, before it improves.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM, get_gradmem_model


NAMES = ["Tom", "Lily", "Ben", "Anna", "Sam", "Mia", "Max", "Sue", "Tim", "Amy", "Jack", "Lucy"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "pink", "orange"]
Fact = tuple[str, str]


def is_held_out(name: str, colour: str) -> bool:
    return (NAMES.index(name) + COLOURS.index(colour)) % 4 == 0


def draw_facts(rng: random.Random, count: int, held_out: bool) -> list[Fact]:
    """Facts on different names: those kept out of training, or those that are not."""
    return [
        (name, rng.choice([colour for colour in COLOURS if is_held_out(name, colour) == held_out]))
        for name in rng.sample(NAMES, count)
    ]


def sentences(facts: Iterable[Fact]) -> str:
    return " ".join(f"{name} has a {colour} ball." for name, colour in facts)


def make_batch(contexts: list[list[Fact]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """The contexts, and a query for each fact; only the colour is learned."""
    written = tokenizer([sentences(facts) for facts in contexts], return_tensors="pt", padding=True)
    queries = [f"{name} has a" for facts in contexts for name, _ in facts]
    answers = [f" {colour}" for facts in contexts for _, colour in facts]
    whole = tokenizer([q + a for q, a in zip(queries, answers, strict=True)], return_tensors="pt", padding=True)
    labels = whole.input_ids.masked_fill(whole.attention_mask == 0, -100)
    for row, query in zip(labels, queries, strict=True):
        row[: len(tokenizer(query).input_ids)] = -100
    return {
        "context_ids": written.input_ids,
        "context_attention_mask": written.attention_mask,
        "input_ids": whole.input_ids,
        "attention_mask": whole.attention_mask,
        "labels": labels,
    }


def build(args: argparse.Namespace) -> GradMemGPTForCausalLM:
    backbone = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if not args.frozen:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        backbone = get_peft_model(backbone, lora)
    config = GradMemConfig(
        n_mem_tokens=8, K=args.K, inner_lr=4.0, learn_inner_lr=True, freeze_backbone=True, use_write_lora=args.frozen
    )
    return get_gradmem_model(backbone, config)


def teach(model: GradMemGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    """Trains on fresh facts; the learning rate of inner_lr is 20 times the others'."""
    others = [p for name, p in model.named_parameters() if p.requires_grad and name != "inner_lr"]
    rates = (args.learning_rate, 20 * args.learning_rate)
    groups = [{"params": others}, {"params": [model.inner_lr]}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    rng = random.Random(args.seed)
    model.train()
    for step in (bar := trange(args.steps, desc="Learning to write")):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 50)
        contexts = [draw_facts(rng, args.facts, held_out=False) for _ in range(args.batch_size)]
        loss = model(**make_batch(contexts, tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def share_answered(
    model: GradMemGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, other_facts: bool
) -> float:
    """How many facts kept out of training are answered, from their memory or from that of other facts."""
    rng, model = random.Random(args.seed + 1), model.eval()
    contexts = [draw_facts(rng, args.facts, held_out=True) for _ in range(64)]
    batch = make_batch(contexts, tokenizer)
    written = model.write(batch.pop("context_ids"), batch.pop("context_attention_mask"))
    memory = written[[*range(1, 64), 0]] if other_facts else written
    labels = batch["labels"][:, 1:]
    predictions = model(**batch, memory=memory).logits[:, :-1].argmax(-1)
    return ((predictions == labels) | (labels == -100)).all(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a causal LM: folder or Hub id")
    parser.add_argument("--out", type=Path, default=Path("out/facts"), help="folder of model and memory")
    parser.add_argument("--text", default="Tom has a red ball. Lily has a blue ball.")
    parser.add_argument("--frozen", action="store_true", help="leave the reading model as it is")
    parser.add_argument("--facts", type=int, default=2, help="in each context of the training")
    parser.add_argument("--K", type=int, default=2, help="gradient steps of a write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = build(args)
    teach(model, tokenizer, args)
    right, wrong = (share_answered(model, tokenizer, args, other_facts) for other_facts in (False, True))
    print(f"answered {right:.3f} of facts kept out of training, {wrong:.3f} from the memory of other facts")
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    ids = tokenizer(args.text, return_tensors="pt").input_ids
    memory = model.write(ids)
    memory.save_pretrained(args.out / "memory")
    before, after = memory.provenance[0]["writes"][0]["inner_losses"][0], model.inner_loss(ids, memory=memory).item()
    print(f"wrote {args.text!r}: its loss per token {before:.2f} -> {after:.2f}; saved in {args.out / 'memory'}")


if __name__ == "__main__":
    main()
