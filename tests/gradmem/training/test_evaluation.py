"""Evaluation against a plain loop: exact match by teacher forcing and by generation, inner losses, other contexts."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM
from hf_gradtools.gradmem.kv_retrieval import (
    GradMemCollator,
    KVRetrievalConfig,
    PromptCollator,
    build_kv_tokenizer,
    generate_kv_dataset,
)
from hf_gradtools.gradmem.training.evaluation import (
    Means,
    answers,
    evaluate_rows,
    ignored_ids,
    with_wrong_contexts,
)


CONFIG = KVRetrievalConfig(num_pairs=2, key_length=1, value_length=2, vocab_size=4)
ROWS, TOKENIZER = generate_kv_dataset(CONFIG, 9, seed=0), build_kv_tokenizer(4)


def with_memory():
    torch.manual_seed(0)
    base = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GradMemGPTForCausalLM(GradMemConfig(base_config=base, n_mem_tokens=2, inner_lr=1.0, K=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.dim() > 1 else 1)
    return model


def encode(text):
    return torch.tensor([TOKENIZER(text, add_special_tokens=False).input_ids])


def test_memories_are_evaluated_as_by_a_plain_loop():
    model, right, losses, inner = with_memory(), [], [], []
    for row in ROWS:
        memory = model.write(encode(row["context"]), K=1)
        inner.append([model.inner_loss(encode(row["context"]), memory=m).item() for m in (None, memory)])
        query, target = encode(row["query"]), encode(row["target"])
        logits = model(torch.cat([query, target], 1), memory=memory).logits[:, query.shape[1] - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits[0], target[0]).item())
        right.append(torch.equal(logits.argmax(-1)[0, :2], target[0, :2]))
    metrics = evaluate_rows(
        model, ROWS, collator=GradMemCollator(TOKENIZER), batch_size=4, ignored_ids=ignored_ids(TOKENIZER), K=1
    )
    assert metrics["loss"] == pytest.approx(sum(losses) / 9, rel=1e-4)
    assert metrics["exact_match"] == pytest.approx(sum(right) / 9)
    for step in range(2):
        assert metrics[f"inner_loss_{step}"] == pytest.approx(sum(loss[step] for loss in inner) / 9, rel=1e-4)
    assert "inner_loss_2" not in metrics


@pytest.mark.parametrize("vanilla", [False, True])
def test_generation_is_compared_with_whole_answers(vanilla, monkeypatch):
    """A model that says the right thing but to the queries of some rows."""
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": len(TOKENIZER), "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval() if vanilla else with_memory()
    rows = iter(ROWS)
    seen = []

    def generate(prompts, attention_mask, max_new_tokens, **kwargs):
        said = []
        for prompt, mask in zip(prompts, attention_mask, strict=True):
            row = next(rows)
            text = row["context"] * vanilla + row["query"]
            assert prompt[mask.bool()].tolist() == encode(text)[0].tolist()
            answer = row["target"] if len(seen) % 3 else row["target"][:-1] + "!"
            seen.append(answer == row["target"])
            said.append(encode(answer)[0])
        return torch.cat([prompts, torch.stack(said)], 1)

    monkeypatch.setattr(model, "generate", generate)
    collator = (PromptCollator if vanilla else GradMemCollator)(TOKENIZER)
    metrics = evaluate_rows(model, ROWS, collator=collator, batch_size=4, ignored_ids=ignored_ids(TOKENIZER))
    assert metrics["generated_exact_match"] == pytest.approx(sum(seen) / 9) == pytest.approx(6 / 9)


def test_prompts_are_cut_before_the_answer_and_padded_on_the_left():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 0], [3, 4, 9, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 8, -100], [-100, 4, 9, -100, -100]]),
    }
    prompts, mask, wanted = answers(batch)
    assert prompts.tolist() == [[5, 6, 7], [0, 0, 3]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert wanted.tolist() == [[8, -100], [4, 9]]


def test_wrong_contexts_are_those_of_the_row_before():
    wrong = with_wrong_contexts(ROWS)
    assert wrong["context"][:] == ROWS["context"][-1:] + ROWS["context"][:-1]
    assert wrong["query"][:] == ROWS["query"][:]


def test_means_of_several_processes_are_weighted():
    first, second = Means(), Means()
    first.add("x", 1.0, 3)
    second.add("x", 5.0, 1)
    both = {"x": 2.0}
    sums = torch.tensor([[5.0, 1.0]], dtype=torch.float64)
    assert first.values(total=lambda mine: mine + sums) == both
