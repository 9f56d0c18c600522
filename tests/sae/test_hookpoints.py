import pytest
import torch
from torch import nn

from hf_gradtools.sae.hookpoints import capture, d_in, decoder_blocks, list_hookpoints, resolve, run, widths
from tests.sae.tiny_models import LAYERS, MODELS, WIDTH, gpt2, llama, make_sequences


NAMES = [f"layers.{i}" for i in range(LAYERS)]


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_captured_states_are_those_that_the_model_reports(model):
    ids = make_sequences(4)
    captured = run(model, NAMES, input_ids=ids)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for i in range(LAYERS - 1):
        assert torch.equal(captured[f"layers.{i}"], states[i + 1])
    norm = model.base_model.norm if model.config.model_type == "llama" else model.base_model.ln_f
    assert torch.equal(norm(captured[NAMES[-1]]), states[-1])  # reported behind the final norm


def test_stopping_early_changes_no_value_and_leaves_no_hook(model):
    ids, before = make_sequences(2), hooks_of(model)
    with torch.no_grad():
        logits = model(ids).logits
        with capture(model, NAMES) as whole:
            model(ids)
    for name in NAMES:
        assert torch.equal(run(model, [name], input_ids=ids)[name], whole[name])
    assert hooks_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_nothing_behind_the_last_hookpoint_runs(model):
    ran = []
    for i, block in enumerate(decoder_blocks(model)):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.get_output_embeddings().register_forward_hook(lambda *_: ran.append("head"))
    run(model, ["layers.1", "layers.0"], input_ids=make_sequences(1))
    assert ran == [0, 1]
    run(model, ["layers.2"], input_ids=make_sequences(1))
    assert "head" not in ran


def test_a_failing_forward_leaves_no_hook(model):
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="broken"), capture(model, NAMES):
        raise RuntimeError("broken")
    with pytest.raises(IndexError):
        run(model, NAMES, input_ids=torch.tensor([[10**6]]))
    assert hooks_of(model) == before


def test_paths_inside_blocks_and_own_names_resolve():
    assert resolve(gpt2(), "layers.1.mlp.c_fc").nf == 4 * WIDTH
    model = gpt2()
    assert resolve(model, "h.1.mlp") is resolve(model, "layers.1.mlp") is model.transformer.h[1].mlp
    assert resolve(model.transformer, "layers.2") is model.transformer.h[2]
    assert list_hookpoints(model) == NAMES
    assert d_in(model, "layers.1.mlp.c_fc") == 4 * WIDTH
    assert widths(llama(), ["layers.0", "layers.0.mlp.up_proj"]) == {"layers.0": WIDTH, "layers.0.mlp.up_proj": 48}


def test_modules_that_return_tuples_are_captured():
    model, ids = llama(), make_sequences(1)
    attention = run(model, ["layers.0.self_attn"], input_ids=ids)["layers.0.self_attn"]
    projected = run(model, ["layers.0.self_attn.o_proj"], input_ids=ids)["layers.0.self_attn.o_proj"]
    assert torch.equal(attention, projected)


@pytest.mark.parametrize("hookpoint", ["layers.3", "layers.0.nothing", "blocks.0", "", "layers.-1"])
def test_unknown_hookpoint_is_named_with_valid_ones(model, hookpoint):
    with pytest.raises(ValueError, match=rf"hookpoint='{hookpoint}'.*layers\.0 \.\.\. layers\.2") as error:
        run(model, [hookpoint], input_ids=make_sequences(1))
    assert "mlp" in str(error.value)


@pytest.mark.parametrize("hookpoint", ["rotary_emb", "layers"])
def test_missing_hidden_state_is_said(hookpoint):
    with pytest.raises(ValueError, match=f"missing hidden state: hookpoint='{hookpoint}'"):
        run(llama(), [hookpoint], input_ids=make_sequences(2))


def test_a_model_without_blocks_or_not_of_transformers_is_refused():
    model = llama()
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match=r"missing hidden state: .*num_hidden_layers=3.*layers \(2\)"):
        decoder_blocks(model)
    with pytest.raises(ValueError, match="model is a Linear"):
        list_hookpoints(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="hookpoints is empty"):
        run(llama(), [], input_ids=make_sequences(1))
