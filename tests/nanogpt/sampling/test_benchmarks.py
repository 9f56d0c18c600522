import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.sampling.benchmarks import evaluate_tasks, harness_model, result_rows


ROWS = [
    {"question": "the end", "choices": ["abc", "de"], "label": 0},
    {"question": "[b] a text that is longer than what the model sees", "choices": ["x", "yy"], "label": 1},
    {"question": "or", "choices": ["a", "b"], "label": 1},
    {"question": "", "choices": ["a", "\nb"], "label": 0},
]  # fmt: skip
TASK = """
task: tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.json}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
metadata: {{version: 1.0}}
{more}
"""
KINDS = {
    "multiple_choice": ("label", "doc_to_choice: choices\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]"),
    "loglikelihood_rolling": ("question", "metric_list: [{metric: byte_perplexity}]"),
    "generate_until": (
        "question", "generation_kwargs: {until: ['e'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]"
    ),
}  # fmt: skip


@pytest.fixture
def tasks(tmp_path, datasets_cache):
    """Folder of one task of each kind, of the rows above."""
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, ROWS)))
    for kind, (target, more) in KINDS.items():
        task = TASK.format(kind=kind, folder=tmp_path, target=target, more=more)
        (tmp_path / f"{kind}.yaml").write_text(task)
    return tmp_path


def make_model(vocab_size, positions="rotary", block_size=16):
    names = ("rotary", "abs_pos")
    config = NanoGPTConfig(
        vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=32, initializer_range=0.3,
        dropout=0.1,
        **{f"use_{name}_embeddings": name == positions for name in names},
    )  # fmt: skip
    return NanoGPTForCausalLM(config)


@torch.no_grad()
def direct_sum(model, context, continuation, block_size=16):
    """log p(continuation | context), token by token, of the last `block_size` tokens before each forward's end."""
    window = (context + continuation)[-(block_size + 1) :]
    log_shares = model.eval()(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1)
    targets = torch.tensor(window[1:])
    return log_shares[range(len(targets)), targets][-len(continuation) :].sum().item()


@pytest.mark.parametrize("positions", ["rotary", "abs_pos"])
def test_log_likelihoods_equal_direct_sums(tasks, chars, positions, caplog):
    model = make_model(len(chars), positions).train()
    results = evaluate_tasks(model, chars, ["tiny_multiple_choice"], tasks, batch_size=3, log_samples=True)
    assert model.training
    correct = []
    for sample in results["samples"]["tiny_multiple_choice"]:
        sums = []
        for (context, answer), [(found, _)] in zip(sample["arguments"], sample["resps"], strict=True):
            ids = chars(answer)["input_ids"]
            # Nothing before a text: it follows a newline, unless it begins with one.
            context_ids = chars(context)["input_ids"] or ([0] if ids[0] != 0 else [])
            sums.append(direct_sum(model, context_ids or ids[:1], ids if context_ids else ids[1:]))
            assert found == pytest.approx(sums[-1], abs=1e-4)
        correct.append(max(range(len(sums)), key=sums.__getitem__) == sample["doc"]["label"])
    assert len(correct) == 4
    assert "2 of 8 texts are longer than the 16 tokens" in caplog.text
    (row,) = result_rows(results)
    assert (row["task"], row["metric"]) == ("tiny_multiple_choice", "acc")
    assert row["value"] == pytest.approx(sum(correct) / 4)


def test_rolling_log_likelihood_covers_every_token_once(chars):
    model = make_model(len(chars))
    text = chars("a text of more than two times sixteen characters")["input_ids"]
    request = Instance("loglikelihood_rolling", {}, (chars.decode(text),), 0)
    (found,) = harness_model(model, chars).loglikelihood_rolling([request], disable_tqdm=True)
    expected = direct_sum(model, [0], text[:16]) + direct_sum(model, text[:16], text[16:32])
    expected += direct_sum(model, text[:32], text[32:])
    assert found == pytest.approx(expected, abs=1e-4)


def test_texts_are_generated_without_special_tokens(tasks, chars):
    model = make_model(len(chars), block_size=128).eval()
    results = evaluate_tasks(model, chars, ["tiny_generate_until"], tasks, log_samples=True)
    for sample in results["samples"]["tiny_generate_until"]:
        prompt = chars(sample["arguments"][0][0] or "\n", return_tensors="pt")["input_ids"]
        expected = chars.decode(model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :])
        assert sample["resps"] == [[expected.partition("e")[0]]]


def test_the_vocabulary_stays_as_it_is(chars):
    model = make_model(len(chars))
    harness = harness_model(model, chars)
    assert isinstance(harness, HFLM)
    assert harness.max_length == 16
    assert (len(chars), chars.pad_token, len(harness.tokenizer)) == (34, None, 34)
    assert harness.tok_encode("\n[a]\n") == chars("\n[a]\n")["input_ids"]
    assert harness.tok_decode(chars("\n[a]\n")["input_ids"]) == "\n[a]\n"  # padding is a newline, and not skipped
    assert harness.prefix_token_id == 0
    assert harness_model(model, chars, block_size=8).max_length == 8


def test_a_tokenizer_with_special_tokens_keeps_its_own(chars):
    chars.add_special_tokens({"eos_token": "."})
    harness = harness_model(make_model(len(chars)), chars)
    assert harness.prefix_token_id == harness.eot_token_id == harness.tokenizer.pad_token_id == 33


def test_what_cannot_be_scored_is_named(tasks, chars):
    model = make_model(len(chars), block_size=3)
    with pytest.raises(ValueError, match="scores a text of 5 tokens; the model takes 1 to 3"):
        harness_model(model, chars)._loglikelihood_tokens([(("", ""), [1], [1] * 5)], disable_tqdm=True)
    with pytest.raises(ValueError, match=r"does not know, \['Q'\]"):
        harness_model(model, chars).tok_encode("aQ")
    with pytest.raises(ValueError, match="is no folder"):
        evaluate_tasks(model, chars, ["tiny"], tasks / "nowhere")
    with pytest.raises(ValueError, match="lm_eval_tasks is empty"):
        evaluate_tasks(model, chars, [])
