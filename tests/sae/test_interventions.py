import pytest
import torch

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.interventions import ablate, edit, replace, steer
from hf_gradtools.sae.modeling_sae import SAE
from tests.sae.tiny_models import MODELS, WIDTH, llama, make_sequences


HOOKPOINT = "layers.1"


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def sae():
    sae = SAE(SAEConfig(WIDTH, 96, k=6, hookpoint=HOOKPOINT), seed=3).eval()
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    return sae


def block_of(model):
    return (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[1]


@torch.no_grad()
def by_hand(model, ids, change):
    """Logits with block 1's output changed by a hook written out here."""

    def hook(module, args, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = block_of(model).register_forward_hook(hook)
    logits = model(ids).logits
    handle.remove()
    return logits


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@torch.no_grad()
def test_steering_adds_the_decoder_row_everywhere(model, sae):
    ids = make_sequences(2)
    with steer(model, sae, 7, 2.5):
        found = model(ids).logits
    torch.testing.assert_close(found, by_hand(model, ids, lambda x: x + 2.5 * sae.W_dec[7]))
    assert not torch.allclose(found, model(ids).logits)


@torch.no_grad()
def test_replacing_leaves_the_first_positions(model, sae):
    ids = make_sequences(2)

    def change(x):
        return torch.cat([x[:, :2], sae.decode(sae.encode(x[:, 2:]))], 1)

    with replace(model, {HOOKPOINT: sae}, skip_positions=2):
        found = model(ids).logits
    torch.testing.assert_close(found, by_hand(model, ids, change))


@torch.no_grad()
def test_replacing_with_the_error_changes_nothing(model, sae):
    ids = make_sequences(2)
    with replace(model, {HOOKPOINT: sae}, keep_error=True, skip_positions=0):
        kept = model(ids).logits
    with replace(model, {HOOKPOINT: sae}, skip_positions=0):
        lost = model(ids).logits
    torch.testing.assert_close(kept, model(ids).logits)
    assert not torch.allclose(lost, model(ids).logits, atol=1e-3)


def test_with_the_error_gradients_pass_through_the_latents(sae):
    model, ids = llama(), make_sequences(1)
    with replace(model, {HOOKPOINT: sae}, keep_error=True):
        model(ids).logits.square().sum().backward()
    assert sae.W_dec.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_ablation_subtracts_what_the_features_write(model, sae):
    ids = make_sequences(2)
    count = torch.zeros(96)
    by_hand(model, ids, lambda x: (count.add_((sae.encode(x) > 0).float().sum((0, 1))), x)[1])
    features = count.topk(2).indices.tolist()

    def change(x):
        latents = sae.encode(x[:, 1:])
        mask = torch.zeros(96)
        mask[features] = 1
        return torch.cat([x[:, :1], x[:, 1:] - (latents * mask) @ sae.W_dec], 1)

    with ablate(model, sae, features):
        found = model(ids).logits
    torch.testing.assert_close(found, by_hand(model, ids, change))
    assert not torch.allclose(found, model(ids).logits)


@pytest.mark.parametrize("kind", ["steer", "replace", "ablate"])
def test_generating_with_a_cache_equals_generating_without(model, sae, kind):
    ids = make_sequences(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    contexts = {
        "steer": lambda: steer(model, sae, 5, 3.0, skip_positions=2),
        "replace": lambda: replace(model, {HOOKPOINT: sae}, skip_positions=2),
        "ablate": lambda: ablate(model, sae, range(48), skip_positions=2),
    }
    with contexts[kind]():
        cached = model.generate(ids, use_cache=True, **options)
        plain = model.generate(ids, use_cache=False, **options)
    untouched = model.generate(ids, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))
    assert not torch.allclose(torch.stack(cached.logits), torch.stack(untouched.logits), atol=1e-3)


def test_modules_that_put_out_tuples_keep_the_rest(sae):
    model, ids = llama(), make_sequences(1)
    name = "layers.1.self_attn"  # puts out (states, attention weights)
    seen = []
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(), edit(model, {name: lambda x: x * 0}):
        model(ids)
        found = seen.pop()
        model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: seen.append(output))
        model(ids)
    assert isinstance(found, tuple)
    assert isinstance(seen[-1], tuple)
    assert len(seen[-1]) == len(found)
    assert seen[-1][0].abs().max() == 0


def test_hooks_are_gone_after_errors(model, sae):
    with pytest.raises(RuntimeError, match="mine"), steer(model, sae, 0, 1.0), replace(model, {HOOKPOINT: sae}):
        raise RuntimeError("mine")
    with pytest.raises(ValueError, match="no module"), replace(model, {HOOKPOINT: sae, "layers.99": sae}):
        pass
    with pytest.raises(ValueError, match="made"), edit(model, {HOOKPOINT: lambda x: x[..., :3]}):
        model(make_sequences(1))
    assert hooks_of(model) == []


@torch.no_grad()
def test_half_precision_models_stay_in_half_precision(sae):
    model = llama().bfloat16()
    with steer(model, sae, 1, 1.0), replace(model, {HOOKPOINT: sae}), ablate(model, sae, 3):
        assert model(make_sequences(1)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (lambda model, sae: steer(model, sae, 96, 1.0), "feature=96 is not a feature. Pass 0 ... 95"),
        (lambda model, sae: ablate(model, sae, []), "features is empty"),
        (lambda model, sae: replace(model, {}), "changes is empty"),
        (lambda model, sae: edit(model, {HOOKPOINT: abs}, skip_positions=-1), "skip_positions=-1"),
        (lambda model, sae: steer(model, SAE(SAEConfig(WIDTH, 8, k=1)), 0, 1.0), "hookpoint=None"),
    ],
)
def test_bad_input_is_named(sae, context, message):
    with pytest.raises(ValueError, match=message), context(llama(), sae):
        pass
