"""The example that trains on questions, on a tiny model and tiny files."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_gradtools.gradmem.kv_retrieval import build_kv_tokenizer


EXAMPLE = Path(__file__).parents[3] / "examples" / "gradmem" / "train_on_qa.py"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = build_kv_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def squad(folder):
    rows = [{"context": f"a{i}b" * 3, "question": "who", "answers": [f"a{i}"]} for i in range(12)]
    rows += [{"context": "long" * 50, "question": "who", "answers": ["a"]}]
    path = folder / "squad.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def babi(folder):
    path = folder / "qa1.txt"
    path.write_text("".join(f"1 Mary is at {i}.\n2 Where is Mary?\t{i}\t1\n" for i in range(12)) + "1 Last.\n")
    return path


@pytest.mark.parametrize(
    ("write", "flags", "cases"), [(squad, [], 3), (squad, ["--prompt"], 2), (babi, ["--frozen"], 3)]
)
def test_questions_are_learned_answered_and_compared(
    write, flags, cases, pretrained, tmp_path, monkeypatch, capsys
):  # fmt: skip
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "out"
    words = ["--model", pretrained, "--dataset", write(tmp_path), "--out", out, "--steps", 2, "--batch_size", 2]
    words += ["--max_context_length", 40, *flags]
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *map(str, words)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "of 12 the paragraph fits: 11 to train on, 1 held out" in said
    lines = [line for line in said.splitlines() if line.startswith("| ") and "loss" not in line]
    assert len(lines) == cases
    assert lines[0].startswith("| its paragraph | ")
    AutoModelForCausalLM.from_pretrained(out)
