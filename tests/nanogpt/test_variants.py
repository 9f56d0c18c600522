"""What every variant and every combination owes: it sees no future, no neighbour and no padding, and remembers."""

import pytest
import torch
from transformers import DynamicCache

from hf_gradtools.nanogpt.hardware import hardware_report
from tests.nanogpt.tiny import CASES, MIXING, SIZES, build, config, ids, model


BLOCK = SIZES["block_size"]


@torch.no_grad()
def logits(case, input_ids, **inputs):
    return model(case)(input_ids, **inputs).logits


@pytest.mark.parametrize("case", CASES)
def test_a_token_is_felt_from_its_place_on_and_not_before(case):
    before = ids(2, 9)
    after = before.clone()
    after[:, 5] = (before[:, 5] + 3) % SIZES["vocab_size"]
    change = (logits(case, before) - logits(case, after)).abs().amax(dim=(0, 2))
    assert change[:5].max() < 1e-12
    assert change[5] > 1e-4


@pytest.mark.parametrize("case", MIXING)
def test_rows_of_a_batch_do_not_meet(case):
    rows = ids(3, 7)
    together = logits(case, rows)
    for row in range(3):
        torch.testing.assert_close(logits(case, rows[row : row + 1]), together[row : row + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", MIXING)
def test_padding_is_not_seen(case, side):
    lengths, rows = (7, 4, 1), ids(3, 7)
    padded, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    spans = [slice(7 - n, 7) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        padded[row, span], mask[row, span] = rows[row, :n], 1
    found = logits(case, padded, attention_mask=mask)
    assert found.isfinite().all()
    for row, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        torch.testing.assert_close(found[row, span], logits(case, rows[row : row + 1, :n])[0], atol=1e-10, rtol=0)


def mixers(case):
    one = config(case)
    return {one.of_layer("attention_variant", layer) for layer in range(one.n_layer)}


def measures_places(case):
    """Whether distances are counted in places of the row, padding included."""
    one = config(case)
    return one.sliding_window is not None or one.use_fire_embeddings or "ssm" in mixers(case)


@pytest.mark.parametrize("case", [case for case in MIXING if not measures_places(case)])
def test_padding_between_tokens_is_not_seen(case):
    rows, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, 2:4] = mask[1, 5] = 0
    found = logits(case, rows, attention_mask=mask)
    for row in range(2):
        kept = mask[row] == 1
        torch.testing.assert_close(found[row, kept], logits(case, rows[row : row + 1, kept])[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", ["window", "position=fire", "attention=ssm"])
def test_padding_between_tokens_is_refused_where_distances_would_count_it(case):
    with pytest.raises(ValueError, match="padding between the tokens"):
        logits(case, ids(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]))


@pytest.mark.parametrize("case", [case for case in MIXING if mixers(case) <= {"causal", "infinite", "mla"}])
def test_documents_packed_in_a_row_do_not_meet(case):
    rows, lengths = ids(1, 9), [4, 2, 3]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = logits(case, rows, position_ids=positions)
    for part, alone in zip(found.split(lengths, dim=1), rows.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(part, logits(case, alone), atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", ["attention=ssm", "attention=linear", "ssm in turn"])
def test_packed_documents_are_refused_where_a_state_would_carry_over(case):
    with pytest.raises(ValueError, match="position_ids that restart"):
        logits(case, ids(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 3, 1], [1, 8]], ids=["token by token", "chunks", "one then all"])
@pytest.mark.parametrize("case", MIXING)
def test_the_cache_changes_no_logit(case, pieces):
    rows = ids(2, 9)
    cache, found = DynamicCache(config=model(case).config), []
    for piece in rows.split(pieces, dim=1):
        found.append(logits(case, piece, past_key_values=cache, use_cache=True))
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(found, dim=1), logits(case, rows), atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", MIXING)
def test_the_cache_changes_no_logit_of_a_padded_batch(case):
    rows, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    cache, found, seen = DynamicCache(config=model(case).config), [], 0
    for piece in rows.split([5, 2, 1], dim=1):
        seen += piece.shape[1]
        found.append(logits(case, piece, past_key_values=cache, use_cache=True, attention_mask=mask[:, :seen]))
    whole = logits(case, rows, attention_mask=mask)
    torch.testing.assert_close(torch.cat(found, dim=1)[mask == 1], whole[mask == 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", MIXING)
def test_a_row_of_nothing_but_padding_gives_finite_logits_and_gradients(case):
    one = build(case, torch.float32).train()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1] = 0
    out = one(ids(2, 5), attention_mask=mask, labels=ids(2, 5)[:1].expand(2, 5).masked_fill(mask == 0, -100))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in one.parameters())


@pytest.mark.parametrize("case", MIXING)
def test_bfloat16_runs_forward_and_backward(case):
    one = build(case, torch.bfloat16).train()
    loss = one(ids(2, 6), labels=ids(2, 6)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in one.parameters())


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case):
    one = build(case).train()
    one(ids(2, 6), labels=ids(2, 6)).loss.backward()
    assert [name for name, p in one.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_survives_json(case, tmp_path):
    one = config(case)
    one.save_pretrained(tmp_path)
    again = type(one).from_pretrained(tmp_path)
    assert again.to_dict() == one.to_dict()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \[2, 5\].*\[2, 6\]"),
        ({"input_ids": ids(2, 6), "inputs_embeds": torch.ones(2, 6, 16)}, "exactly one"),
        ({}, "exactly one"),
        ({"input_ids": ids(1, BLOCK + 1)}, f"position {BLOCK} is past block_size={BLOCK}"),
    ],
    ids=["mask of another length", "ids and embeddings", "nothing", "past the table"],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        model("position=abs_pos")(**inputs)


COUNTED = [case for case in CASES if not case.startswith("activation=") and "window_size" not in CASES[case]]


@pytest.mark.parametrize("case", COUNTED)
def test_the_hardware_report_counts_the_models_own_parameters_and_state(case):
    one, report = model(case), hardware_report(config(case), context=7, bytes_per_number=4)
    assert report.params == sum(parameter.numel() for parameter in one.parameters())
    cache, kept = DynamicCache(config=one.config), 0
    logits(case, ids(1, 7), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        states = layer.states.values() if hasattr(layer, "states") else (layer.keys, layer.values)
        kept += sum(state.numel() for state in states)
    assert report.state_bytes == 4 * kept
