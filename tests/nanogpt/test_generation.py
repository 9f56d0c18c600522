"""`generate()` writes the same with a cache, without one, with a static one, alone and in a padded batch."""

import pytest
import torch

from tests.nanogpt.tiny import MIXING, SIZES, build, ids, model


BLOCK = SIZES["block_size"]
PROMPT = BLOCK - 3


def prompt():
    """Three rows of different lengths, padded on the left."""
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    mask[1, :4] = mask[2, : PROMPT - 1] = 0
    return {"input_ids": ids(3, PROMPT) * mask, "attention_mask": mask}


def new_tokens(case):
    """To beyond the block, but for learned positions, which end there."""
    return 3 if "abs_pos" in model(case).config.position_variants else 6


def write(case, inputs, **options):
    options = {"max_new_tokens": new_tokens(case), "do_sample": False, "pad_token_id": 0, **options}
    return model(case).generate(**inputs, **options)[:, PROMPT:]


@pytest.mark.parametrize("case", MIXING)
def test_with_and_without_a_cache_the_same_is_written(case):
    cached = write(case, prompt(), use_cache=True)
    assert cached.shape == (3, new_tokens(case))
    assert torch.equal(cached, write(case, prompt(), use_cache=False))


@pytest.mark.parametrize("case", MIXING)
def test_two_beams_write_the_same_with_and_without_a_cache(case):
    found = [write(case, prompt(), use_cache=use, num_beams=2, max_new_tokens=3) for use in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("case", MIXING)
def test_a_static_cache_writes_the_same(case):
    assert torch.equal(write(case, prompt(), cache_implementation="static"), write(case, prompt(), use_cache=False))


def test_a_short_row_of_a_batch_is_written_as_it_would_be_alone():
    rows = prompt()
    start = int((rows["attention_mask"][1] == 0).sum())
    alone = {"input_ids": rows["input_ids"][1:2, start:]}
    assert torch.equal(
        write("default", rows)[1:2],
        model("default").generate(**alone, max_new_tokens=6, do_sample=False)[:, PROMPT - start :],
    )


def test_learned_positions_end_with_the_block_and_say_what_to_do():
    case = "position=abs_pos"
    with pytest.raises(ValueError, match=rf"block_size={BLOCK}.*crop_to_block"):
        write(case, prompt(), max_new_tokens=6)


def test_a_cropped_window_goes_on_past_the_block_as_nanogpt_does():
    one, row = model("position=abs_pos"), ids(1, PROMPT)
    found = one.generate(row, max_new_tokens=6, do_sample=False, crop_to_block=True)
    for _ in range(6):
        with torch.no_grad():
            row = torch.cat([row, one(row[:, -BLOCK:]).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, row)


def test_a_cropped_window_drops_padding_first():
    one, rows = model("position=abs_pos"), prompt()
    found = one.generate(**rows, max_new_tokens=6, do_sample=False, crop_to_block=True, pad_token_id=0)
    start = int((rows["attention_mask"][1] == 0).sum())
    alone = one.generate(rows["input_ids"][1:2, start:], max_new_tokens=6, do_sample=False, crop_to_block=True)
    assert torch.equal(found[1:2, start:], alone)


def test_generation_goes_on_from_embeddings():
    one, row = model(), ids(1, 5)
    found = one.generate(inputs_embeds=one.transformer.wte(row), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, one.generate(row, max_new_tokens=4, do_sample=False)[:, 5:])


@pytest.mark.parametrize("case", ["default", "window", "attention=ssm", "attention=linear", "position=fire"])
def test_a_kept_cache_is_gone_on_with(case):
    one, more = model(case), ids(1, 3, seed=3)
    first = one.generate(ids(1, 5), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    text = torch.cat([first.sequences, more], dim=1)
    options = {"attention_mask": torch.ones_like(text), "max_new_tokens": 4, "do_sample": False}
    found = one.generate(text, past_key_values=first.past_key_values, **options)
    assert torch.equal(found, one.generate(text, use_cache=False, **options))


@pytest.mark.parametrize("case", ["attention=ssm", "ssm in turn", "attention=identity"])
def test_going_back_some_tokens_is_refused_where_a_state_cannot(case):
    with pytest.raises((ValueError, NotImplementedError), match="stateful|state"):
        model(case).generate(ids(1, 8), prompt_lookup_num_tokens=3, max_new_tokens=4, do_sample=False)


def test_consmax_on_the_output_makes_sampling_follow_its_weights():
    """Powers over a constant have the proportions of the softmax: sampling is the same."""
    plain, other = build("default"), build("default", softmax_variant_output="consmax")
    texts = []
    for one in (plain, other):
        torch.manual_seed(0)
        texts.append(one.generate(ids(2, 4), max_new_tokens=8, do_sample=True, pad_token_id=0))
    assert torch.equal(*texts)


def test_an_output_variant_without_exponentials_never_draws_a_token_of_weight_zero():
    one, start = build("default", softmax_variant_output="relumax"), ids(4, 4)
    torch.manual_seed(0)
    text = one.generate(start, max_new_tokens=8, do_sample=True, pad_token_id=0, top_k=0)
    with torch.no_grad():
        scores = one(text).logits[:, 3:-1].gather(-1, text[:, 4:, None])
    assert scores.min() > 0
