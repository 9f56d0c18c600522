"""The examples that write facts into a pretrained model's memory, and answer in another process."""

from __future__ import annotations

import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gradtools.gradmem import GradMemory


EXAMPLES = Path(__file__).parents[3] / "examples" / "gradmem"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    facts = runpy.run_path(str(EXAMPLES / "write_facts.py"))
    words = ["<unk>", "<eos>", "has", "a", "ball", ".", *facts["NAMES"], *facts["COLOURS"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("pretrained")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("frozen", [False, True])
def test_facts_are_written_saved_and_asked_for_in_another_process(frozen, pretrained, tmp_path, monkeypatch, capsys):
    flags = ["--model", pretrained, "--out", tmp_path, "--steps", 2, "--batch_size", 2, *["--frozen"] * frozen]
    monkeypatch.setattr(sys, "argv", ["write_facts.py", *map(str, flags)])
    runpy.run_path(str(EXAMPLES / "write_facts.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "of facts kept out of training" in said
    memory = GradMemory.from_pretrained(tmp_path / "memory")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["use_write_lora"] == frozen
    assert [write["tokens"] for write in memory.provenance[0]["writes"]] == [12]
    if not frozen:
        answer = [sys.executable, str(EXAMPLES / "answer_from_memory.py"), str(tmp_path), "Tom has a", "Ben has a"]
        done = subprocess.run(answer, capture_output=True, text=True, timeout=100, check=True)
        assert [line.split()[:3] for line in done.stdout.splitlines()] == [["Tom", "has", "a"], ["Ben", "has", "a"]]


def test_facts_kept_out_of_training_are_not_in_it():
    facts = runpy.run_path(str(EXAMPLES / "write_facts.py"))
    drawn = {held: set() for held in (False, True)}
    for held, seen in drawn.items():
        for seed in range(50):
            seen.update(facts["draw_facts"](random.Random(seed), 3, held))
    assert not drawn[False] & drawn[True]
    assert {name for name, _ in drawn[True]} == set(facts["NAMES"])
