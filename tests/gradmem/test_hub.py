"""Memories and models on a Hub that listens on loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard

from tests.hub_stub import HubStub


ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_gradtools import GradMemConfig, GradMemGPTForCausalLM, GradMemory

torch.manual_seed(0)
base = LlamaConfig(
    vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    bos_token_id=1, eos_token_id=2,
)
model = GradMemGPTForCausalLM(GradMemConfig(base_config=base, n_mem_tokens=2, K=2)).eval()
model.push_to_hub("user/model")
model = AutoModelForCausalLM.from_pretrained("user/model")
memory = model.write(torch.tensor([[3, 4, 5], [6, 7, 8]]))
memory.push_to_hub("user/memory")
again = GradMemory.from_pretrained("user/memory")
assert torch.equal(again.mem, memory.mem) and again.provenance == memory.provenance
assert again.provenance[0]["model"] == "user/model"
query = torch.tensor([[3, 4], [5, 6]])
assert torch.equal(model(query, memory=again).logits, model(query, memory=memory).logits)
"""


def test_a_model_and_its_memory_come_back_from_the_hub(tmp_path):
    with HubStub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=hub.environ(tmp_path), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        card = ModelCard(hub.files("user/memory")["README.md"].decode())
    assert set(card.data.tags) == {"gradmem", "memory"}
    assert "2 memories of 2 vectors of size 8, written from 6 tokens by user/model" in card.text
