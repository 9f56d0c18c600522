"""Questions become batches by any tokenizer of the Hub's kind, and a model with a memory learns from them."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_gradtools.gradmem.qa import GradMemCollator, PromptCollator
from tests.gradmem.tiny import build


ROWS = [
    {"context": "Mary is here.", "query": "Question: Where?\nAnswer:", "target": " here"},
    {"context": "No.", "query": "Question: Who is here?\nAnswer:", "target": " Mary is"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE, whose tokens are longer than characters, and whose pad token is its eos token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet, vocab_size=300)
    bpe.train_from_iterator([text for row in ROWS for text in row.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def test_answers_with_an_end_are_what_is_learned(tokenizer):
    batch = GradMemCollator(tokenizer, max_context_length=3, add_eos_token=True)(ROWS)
    for i, row in enumerate(ROWS):
        query, target, context = (tokenizer(row[name]).input_ids for name in ("query", "target", "context"))
        answer = [*target, tokenizer.eos_token_id]
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == query + answer
        assert batch["labels"][i][real].tolist() == [-100] * len(query) + answer
        assert (batch["labels"][i][~real] == -100).all()
        assert batch["context_ids"][i][batch["context_attention_mask"][i].bool()].tolist() == context[:3]
        prompt = PromptCollator(tokenizer, add_eos_token=True)([row])
        assert prompt["input_ids"].tolist() == [context + query + answer]
        assert prompt["labels"].tolist() == [[-100] * len(context + query) + answer]


def test_an_answer_is_tokenized_as_what_follows_its_query():
    """Llama's tokenizer puts a space before any text: on its own, " here" would begin with two."""
    words = Tokenizer(models.WordLevel({"<end>": 0, "▁": 1, "▁Answer:": 2, "▁here": 3}, unk_token="<end>"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    assert tokenizer(" here").input_ids == [1, 3]
    batch = GradMemCollator(tokenizer)([{"context": "here", "query": "Answer:", "target": " here"}])
    assert batch["input_ids"].tolist() == [[2, 3]]
    assert batch["labels"].tolist() == [[-100, 3]]


def test_a_model_with_a_memory_learns_from_them(tokenizer):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 80}
    model = build(dtype=torch.float32, backbone_fields=sizes)
    batch = GradMemCollator(tokenizer, add_eos_token=True)(ROWS)
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
