"""Answers from a memory that another process wrote: answer_from_memory.py out/facts "Lily has a" (see write_facts)."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradtools.gradmem import GradMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where write_facts.py left model and memory")
    parser.add_argument("queries", nargs="+")
    parser.add_argument("--max_new_tokens", type=int, default=1)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(args.folder / "model").eval()
    memory = GradMemory.from_pretrained(args.folder / "memory")
    for query in args.queries:
        ids = tokenizer(query, return_tensors="pt").input_ids
        answer = model.generate(ids, memory=memory, max_new_tokens=args.max_new_tokens, do_sample=False)
        print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
