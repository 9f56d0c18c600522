import json

import pytest
import torch
import torch.nn.functional as F

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.extraction import extract
from hf_gradtools.sae.loss_recovered import next_token_losses
from hf_gradtools.sae.metrics import density_histogram, evaluate, evaluate_store
from hf_gradtools.sae.modeling_sae import SAE
from tests.sae.tiny_models import MODELS, WIDTH, gpt2, llama, make_sequences


NAMES = ["layers.0", "layers.2"]
COUNT = 7


def make_saes(activation="topk", seed=0):
    saes = {}
    for i, name in enumerate(NAMES):
        sae = SAE(SAEConfig(WIDTH, 96, activation=activation, k=4, hookpoint=name), seed=seed + i)
        with torch.no_grad():
            sae.b_dec.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(i)) * 0.1)
        saes[name] = sae.eval()
    return saes


@torch.no_grad()
def states_of(model, hookpoint, sequences, skip=1):
    number = int(hookpoint.split(".")[1])
    states = []
    block = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[number]
    taken = block.register_forward_hook(
        lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    model(sequences)
    taken.remove()
    return states[0][:, skip:].reshape(-1, WIDTH).double()


@torch.no_grad()
def naive_cross_entropy(model, hookpoint, sequences, function, skip=1):
    """One sequence at a time, one position at a time."""
    block = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[int(hookpoint[-1])]

    def hook(module, args, output):
        state = (output[0] if isinstance(output, tuple) else output).clone()
        for position in range(skip, state.shape[1]):
            state[0, position] = function(state[0, position])
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = block.register_forward_hook(hook)
    losses = []
    for row in sequences:
        logits = model(row[None]).logits[0].double()
        losses += [-logits[t].log_softmax(0)[row[t + 1]].item() for t in range(len(row) - 1)]
    handle.remove()
    return sum(losses) / len(losses)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@torch.no_grad()
def test_reconstruction_metrics_are_of_the_whole_set(model, batch_size):
    saes, sequences = make_saes(), make_sequences(COUNT)
    found = evaluate(model, saes, sequences, batch_size=batch_size, loss_sequences=0, progress=False)
    for name, sae in saes.items():
        x = states_of(model, name, sequences)
        latents = sae.encode(x.float())
        error = x - sae.decode(latents).double()
        spread = (x - x.mean(0)).square().sum()
        density = (latents > 0).double().mean(0)
        result = found[name]
        assert result.num_tokens == len(x)
        assert result.fvu == pytest.approx(float(error.square().sum() / spread), rel=1e-5)
        expected = 1 - float((error - error.mean(0)).square().sum() / spread)
        assert result.explained_variance == pytest.approx(expected, rel=1e-5)
        assert result.cosine == pytest.approx(float(F.cosine_similarity(x, x - error).mean()), rel=1e-5)
        assert result.l0 == pytest.approx(float(density.sum()))
        assert result.density == pytest.approx(density.tolist())
        assert result.dead_fraction == pytest.approx(float((density == 0).double().mean()))
        assert sum(result.density_counts) == int((density > 0).sum())
        assert result.cross_entropy is None


def test_fvu_is_not_a_mean_of_batches():
    model, saes, sequences = llama(), make_saes(), make_sequences(COUNT)
    whole = evaluate(model, saes, sequences, loss_sequences=0, progress=False)
    parts = [evaluate(model, saes, part, loss_sequences=0, progress=False) for part in sequences.split(1)]
    mean = sum(part[NAMES[0]].fvu for part in parts) / len(parts)
    assert abs(mean - whole[NAMES[0]].fvu) > 1e-3


@torch.no_grad()
def test_variance_far_from_zero_is_exact():
    class Far:
        hookpoints, dtype, num_tokens = ["layers.0"], torch.float32, 400

        def __init__(self):
            self.rows = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1)) + 1e4

        def d_in(self, hookpoint):
            return WIDTH

        def chunks(self, start=0, end=None):
            for piece in self.rows[start:end].split(37):
                yield {"layers.0": piece}

    source, sae = Far(), make_saes()["layers.0"]
    found = evaluate_store(source, {"layers.0": sae}, progress=False)["layers.0"]
    x = source.rows.double()
    error = x - sae.decode(sae.encode_sparse(source.rows)).double()
    expected = float(error.square().sum() / (x - x.mean(0)).square().sum())
    assert found.fvu == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("skip", [0, 1])
def test_cross_entropies_are_those_of_a_plain_loop(model, skip):
    saes, sequences = make_saes(), make_sequences(3)
    found = evaluate(model, saes, sequences, batch_size=2, skip_positions=skip, progress=False)
    for name, sae in saes.items():
        mean = states_of(model, name, sequences, skip).mean(0).float()
        loss = {
            "model": naive_cross_entropy(model, name, sequences, lambda x: x, skip),
            "sae": naive_cross_entropy(model, name, sequences, lambda x, sae=sae: sae(x).reconstruction, skip),
            "zero": naive_cross_entropy(model, name, sequences, torch.zeros_like, skip),
            "mean": naive_cross_entropy(model, name, sequences, lambda x, mean=mean: mean, skip),
        }
        result = found[name].cross_entropy
        for kind, expected in loss.items():
            assert getattr(result, kind) == pytest.approx(expected, rel=1e-5), kind
        if loss["zero"] > loss["model"]:
            share = (loss["zero"] - loss["sae"]) / (loss["zero"] - loss["model"])
            assert result.recovered == pytest.approx(share, rel=1e-3, abs=1e-3)
        else:
            assert result.recovered is None


def test_a_perfect_autoencoder_recovers_everything():
    sequences = make_sequences(2)
    sae = SAE(SAEConfig(WIDTH, 2 * WIDTH, activation="relu", hookpoint="layers.1"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
        sae.W_dec.copy_(sae.W_enc)
    found = evaluate(llama(), {"layers.1": sae}, sequences, progress=False)["layers.1"]
    assert found.fvu == pytest.approx(0, abs=1e-10)
    assert found.cross_entropy.sae == pytest.approx(found.cross_entropy.model, rel=1e-6)
    assert found.l0 == pytest.approx(WIDTH, abs=0.5)


def test_logits_that_the_model_changes_after_its_head_are_seen():
    class Capped(type(llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 0.3 * torch.tanh(output.logits / 0.3)
            return output

    model, sequences = llama(), make_sequences(3)
    model.__class__ = Capped
    found = evaluate(model, make_saes(), sequences, progress=False)["layers.0"].cross_entropy
    assert found.model == pytest.approx(naive_cross_entropy(model, "layers.0", sequences, lambda x: x), rel=1e-5)


def test_losses_of_many_tokens_come_in_pieces():
    model, ids = llama(), make_sequences(40, 33)
    pieces = list(next_token_losses(model, ids, plain_head=True))
    assert [len(piece) for piece in pieces] == [1024, 256]
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(torch.cat(pieces), expected)


def test_a_store_gives_what_the_model_gives(tmp_path):
    model, saes, sequences = gpt2(), make_saes(), make_sequences(COUNT)
    store = extract(model, sequences, NAMES, tmp_path, dtype="float32", rows_per_shard=40, progress=False)
    from_model = evaluate(model, saes, sequences, loss_sequences=0, progress=False)
    from_store = evaluate_store(store, saes, progress=False)
    for name in NAMES:
        assert from_store[name].fvu == pytest.approx(from_model[name].fvu, rel=1e-9)
        assert from_store[name].density == from_model[name].density
    assert evaluate_store(store, saes, max_tokens=11, progress=False)[NAMES[0]].num_tokens == 11


def test_results_are_json():
    found = evaluate(llama(), make_saes(), make_sequences(2), progress=False)["layers.0"]
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["cross_entropy"]["model"] == found.cross_entropy.model
    assert len(values["density"]) == 96
    assert "density" not in found.to_dict(density=False)


def test_models_and_autoencoders_keep_their_modes_and_hooks():
    model, saes = llama().train(), make_saes("batchtopk")
    saes["layers.0"].train()
    evaluate(model, saes, make_sequences(2), progress=False)
    assert model.training
    assert saes["layers.0"].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_histogram_has_four_bins_to_a_decade():
    density = torch.tensor([0.0, 0.001, 0.0011, 0.5, 1.0]).double().numpy()
    edges, counts = density_histogram(density, 1000)
    assert edges[::4] == pytest.approx([-3, -2, -1, 0])
    assert counts[0] == 2
    assert sum(counts) == 4
    assert counts[-2:] == [1, 1]  # 0.5 lies below 10 ** -0.25


@pytest.mark.parametrize(
    ("saes", "options", "message"),
    [
        ({}, {}, "saes is empty"),
        ({"layers.0": SAE(SAEConfig(8, 16, k=2))}, {}, r"saes\['layers.0'\] has d_in=8"),
        (make_saes(), {"loss_sequences": -1}, "loss_sequences=-1"),
    ],
)
def test_bad_input_is_named(saes, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(llama(), saes, make_sequences(2), progress=False, **options)


def test_a_model_without_a_head_is_named():
    with pytest.raises(ValueError, match="without a head"):
        evaluate(llama().model, make_saes(), make_sequences(2), progress=False)
