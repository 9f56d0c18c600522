import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_gradtools.ghosttrack.reading import answer_scalars as baselines
from hf_gradtools.ghosttrack.reading.answer_scalars import (
    answer_scalars,
    p_true,
    true_false_prompt,
)
from hf_gradtools.ghosttrack.reading.spans import encode_answers
from tests.ghosttrack.tiny_answers import build, model, tokenizer


PROMPTS = ["Question: a?\nAnswer: ", "It is ", "", "Question: which town is it really, of all?\nAnswer: ", "So:"]
ANSWERS = ["Paris", "Thessaloniki, as ever", "True or False", "é", " no"]
TEXTS = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
STARTS = [len(prompt) for prompt in PROMPTS]


@torch.no_grad()
def scalars_one_by_one(causal_lm, text, start, tokens):
    """The definition, token by token; the tokens of this tokenizer are as long as their bytes."""
    ids = tokens(text)["input_ids"]
    first_byte, read = len(text[:start].encode()), 0
    logprobs, entropies, count = [], [], 0
    for place, (token, name) in enumerate(zip(ids, tokens.convert_ids_to_tokens(ids), strict=True)):
        read += 0 if name == "<s>" else len(name)
        if read <= first_byte:
            continue
        count += 1
        if place == 0:
            continue
        distribution = causal_lm(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(-1)
        logprobs.append(distribution[token].item())
        entropies.append(-(distribution.exp() * distribution).sum().item())
    return {
        "answer_characters": len(text[start:].strip()),
        "answer_tokens": count,
        "mean_logprob": np.mean(logprobs),
        "sum_logprob": np.sum(logprobs),
        "min_logprob": np.min(logprobs),
        "perplexity": np.exp(-np.mean(logprobs)),
        "mean_entropy": np.mean(entropies),
        "max_entropy": np.max(entropies),
    }


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bos", [True, False])
def test_scalars_equal_a_loop_over_tokens(kind, padding_side, bos, monkeypatch):
    monkeypatch.setattr(baselines, "TOKENS_PER_CHUNK", 3)
    found = answer_scalars(model(kind), tokenizer(bos), TEXTS, STARTS, batch_size=3, padding_side=padding_side)
    wanted = [scalars_one_by_one(model(kind), *row, tokenizer(bos)) for row in zip(TEXTS, STARTS, strict=True)]
    assert found.keys() == wanted[0].keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, [row[name] for row in wanted], rtol=1e-10, err_msg=name)


def test_a_model_that_returns_all_logits_gives_the_same(monkeypatch):
    class Plain(torch.nn.Module):
        """Knows neither positions nor how to leave logits out."""

        def __init__(self):
            super().__init__()
            self.inner = model()
            self.config, self.device = self.inner.config, self.inner.device

        def forward(self, input_ids, attention_mask, use_cache):
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            return self.inner(input_ids, attention_mask=attention_mask, position_ids=positions)

    found = answer_scalars(Plain(), tokenizer(), TEXTS, STARTS)
    wanted = answer_scalars(model(), tokenizer(), TEXTS, STARTS)
    for name, values in found.items():
        np.testing.assert_allclose(values, wanted[name], rtol=1e-10)


def test_bfloat16_logits_are_summed_in_float32():
    found = answer_scalars(build("llama", torch.bfloat16), tokenizer(), TEXTS, STARTS)
    exact = answer_scalars(build("llama", torch.float32), tokenizer(), TEXTS, STARTS)
    np.testing.assert_allclose(found["mean_entropy"], exact["mean_entropy"], rtol=0.1)


@pytest.mark.parametrize(
    ("text", "start", "answer_tokens"),
    [
        ("Answer: Paris", 8, [" Paris"]),  # the token that begins at the space
        ("Answer: Paris", 7, [" Paris"]),
        ("Answer: Paris", 10, [" Paris"]),  # begins inside of a token
        ("Answer: Paris True", 8, [" Paris", " True"]),
        ("Paris", 0, None),
    ],
)
@pytest.mark.parametrize("bos", [True, False])
def test_answer_tokens_are_found_at_the_boundary(text, start, answer_tokens, bos):
    [span] = encode_answers(tokenizer(bos), [text], [start])
    tokens = [tokenizer().decode([token]) for token in span.input_ids[span.begin : span.end]]
    assert "".join(tokens).endswith(text[start:])
    assert span.end == len(span.input_ids)
    if answer_tokens:
        assert tokens == answer_tokens
    else:
        assert span.begin == (1 if bos else 0)


@pytest.mark.parametrize(
    ("texts", "starts", "message"),
    [
        (["Answer: "], [8], "the answer of text 0 is empty"),
        (["Answer: Paris"], [13], "the answer of text 0 is empty"),
        (["a b", " \n"], [0, 0], "text 1 is empty"),
        (["a b"], [4], "answer_start=4 of text 0 is outside"),
        (["a b"], [-1], "answer_start=-1 of text 0 is outside"),
        (["a b"], [0, 1], "1 texts and 2 answer_starts"),
        (["x"], [0], "text 0 is one token, 'x'"),
        (["so " * 300], [0], r"text 0 has \d+ tokens; the model has 256 positions"),
    ],
)
def test_bad_texts_are_named(texts, starts, message):
    with pytest.raises(ValueError, match=message):
        answer_scalars(model(), tokenizer(), texts, starts)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="batch_size=0"):
        answer_scalars(model(), tokenizer(), TEXTS, STARTS, batch_size=0)
    with pytest.raises(ValueError, match="padding_side='middle'"):
        answer_scalars(model(), tokenizer(), TEXTS, STARTS, padding_side="middle")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_p_true_is_the_log_odds_of_the_next_token(kind):
    prompts = [
        true_false_prompt("which town?", "Paris"),
        true_false_prompt("", "It is so"),
        true_false_prompt(None, "a"),
    ]
    assert "Proposed answer: Paris" in prompts[0]
    assert prompts[1].startswith("Claim: It is so\n")
    found = p_true(model(kind), tokenizer(), prompts, batch_size=2)
    for odds, prompt in zip(found, prompts, strict=True):
        ids = tokenizer()(prompt)["input_ids"]
        continued = [tokenizer()(prompt + word)["input_ids"] for word in (" True", " False")]
        assert all(row[: len(ids)] == ids for row in continued)
        place = next(i for i, (a, b) in enumerate(zip(*continued, strict=False)) if a != b)
        assert place == len(ids)
        logprobs = model(kind)(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert odds == pytest.approx((logprobs[continued[0][place]] - logprobs[continued[1][place]]).item(), rel=1e-9)


def test_p_true_refuses_a_tokenizer_without_such_tokens():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="no single tokens in which ' True' and ' False' differ"):
        p_true(model(), PreTrainedTokenizerFast(tokenizer_object=words), ["a"])
