import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradtools.nanogpt.sampling.generation import encode_prompt, generate_samples
from hf_gradtools.nanogpt.sampling.options import SampleOptions


def draw(model, tokenizer, top_k=0, keep_logits=True, prompt="ab", **options):
    options = SampleOptions(**{"max_new_tokens": 12, "num_samples": 3, **options})
    return generate_samples(model, tokenizer, encode_prompt(tokenizer, prompt), options, top_k, keep_logits)


@torch.no_grad()
def last_logits(model, ids):
    return model(torch.tensor([ids])).logits[0, -1]


def test_logits_are_the_models_and_scores_are_scaled_and_truncated(gpt2, chars):
    for sample in draw(gpt2, chars, top_k=4, temperature=0.7):
        text = sample.prompt_ids + sample.ids
        for step, token in enumerate(sample.ids):
            expected = last_logits(gpt2, text[: 2 + step])
            torch.testing.assert_close(sample.logits[step], expected, rtol=1e-4, atol=1e-4)
            kept = sample.scores[step].isfinite()
            assert kept.sum() == 4
            assert kept[token]
            torch.testing.assert_close(sample.scores[step][kept], (expected / 0.7)[kept], rtol=1e-4, atol=1e-4)


def test_nothing_is_truncated_unless_asked(gpt2, chars):
    gpt2.generation_config.top_k = 2  # of the model, which the options do not mention
    assert all(sample.scores.isfinite().all() for sample in draw(gpt2, chars))


def test_temperature_zero_takes_the_likeliest(gpt2, chars):
    for sample in draw(gpt2, chars, temperature=0):
        assert sample.ids == sample.logits.argmax(-1).tolist()


def test_a_threshold_keeps_what_is_nearly_as_likely_as_the_likeliest(gpt2, chars):
    (sample,) = draw(gpt2, chars, top_k=1, softmax_threshold=0.3, temperature=1.0, num_samples=1)
    shares = sample.logits.softmax(-1)
    assert torch.equal(sample.scores.isfinite(), shares >= 0.3 * shares.max(-1, keepdim=True).values)


def test_samples_depend_on_the_seed_alone(gpt2, chars):
    gpt2.train()  # with dropout
    first = draw(gpt2, chars, seed=1)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert [s.ids for s in draw(gpt2, chars, seed=1, keep_logits=False)] == [s.ids for s in first]
    assert [s.ids for s in draw(gpt2, chars, seed=2)] != [s.ids for s in first]
    assert torch.equal(torch.random.get_rng_state(), state)  # which is its caller's
    assert len({tuple(s.ids) for s in first}) == 3
    assert gpt2.training
    greedy = draw(gpt2, chars, temperature=0)
    assert greedy[0].ids == greedy[1].ids


def test_batches_do_not_change_how_many_there_are(gpt2, chars):
    assert len(draw(gpt2, chars, num_samples=5, batch_size=2)) == 5


def test_beyond_its_positions_the_model_sees_the_last_tokens(gpt2, chars):
    for sample in draw(gpt2, chars, max_new_tokens=24, prompt="abcd" * 3):
        assert len(sample.ids) == 24
        text = sample.prompt_ids + sample.ids
        for step in (0, 4, 5, 23):
            expected = last_logits(gpt2, text[: 12 + step][-16:])
            torch.testing.assert_close(sample.logits[step], expected, rtol=1e-4, atol=1e-4)


def test_a_smaller_block_size_crops_earlier(gpt2, chars):
    (sample,) = draw(gpt2, chars, num_samples=1, block_size=3, max_new_tokens=6)
    expected = last_logits(gpt2, (sample.prompt_ids + sample.ids)[4:7])
    torch.testing.assert_close(sample.logits[5], expected, rtol=1e-4, atol=1e-4)


def test_without_cropping_the_cache_grows_on(chars):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(chars), max_position_embeddings=8, eos_token_id=None, **sizes)
    model = LlamaForCausalLM(config).eval()
    (sample,) = draw(model, chars, num_samples=1, crop_context=False)
    torch.testing.assert_close(sample.logits[11], last_logits(model, (sample.prompt_ids + sample.ids)[:13]))


@pytest.mark.parametrize("new", [12, 40])  # in one call, and token by token
def test_a_sample_ends_with_the_end_token(gpt2, chars, new):
    gpt2.generation_config.eos_token_id = 5
    for sample in draw(gpt2, chars, max_new_tokens=new, num_samples=8, temperature=3.0):
        assert 5 not in sample.ids[:-1]
        assert sample.ids[-1] == 5 or len(sample.ids) == new
        assert len(sample.logits) == len(sample.ids)


def test_a_sample_ends_with_a_stop_string(gpt2, chars):
    (free,) = draw(gpt2, chars, num_samples=1)
    stop = chars.decode(free.ids[3:5])
    (sample,) = draw(gpt2, chars, num_samples=1, stop_strings=["never", stop])
    assert sample.ids == free.ids[: len(sample.ids)]
    assert chars.decode(sample.ids).endswith(stop)
    assert stop not in chars.decode(sample.ids[:-1])


def test_prompts_that_cannot_be_read_are_refused(chars):
    with pytest.raises(ValueError, match="'Z'"):
        encode_prompt(chars, "abZ")
    with pytest.raises(ValueError, match="start='' has no tokens"):
        encode_prompt(chars, "")
    chars.bos_token = "\n"
    assert encode_prompt(chars, "") == [0]


def test_options_are_checked(gpt2, chars):
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": [-1]}, {"num_samples": 0}, {"colorize_mode": "x"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SampleOptions(**wrong)
    with pytest.raises(ValueError, match="block_size=17 is more than the 16 tokens"):
        draw(gpt2, chars, block_size=17)


def test_a_prompt_may_stand_in_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("a\r\n[/b] é".encode())
    assert SampleOptions(start=f"FILE:{tmp_path}/prompt.txt").start_text() == "a\r\n[/b] é"
    with pytest.raises(ValueError, match="cannot be read"):
        SampleOptions(start="FILE:nowhere.txt").start_text()


def test_an_output_softmax_has_its_own_probabilities(chars):
    from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM

    sizes = {"vocab_size": len(chars), "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    config = NanoGPTConfig(**sizes, softmax_variant_output="relumax", initializer_range=1.0)
    model = NanoGPTForCausalLM(config).eval()
    (sample,) = draw(model, chars, num_samples=1, temperature=1.0)
    text = sample.prompt_ids + sample.ids
    for step in range(len(sample.ids)):
        weights = last_logits(model, text[: 2 + step]).relu()  # relumax, whose divisor cancels
        torch.testing.assert_close(sample.logits[step].softmax(-1), weights / weights.sum(), rtol=1e-4, atol=1e-5)
