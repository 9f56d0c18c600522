import numpy as np
import pytest
import scipy.stats
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.analysis import activation_statistics, block_batches, weight_statistics


IDS = [i * 7 % 30 for i in range(53)]


@pytest.fixture(params=["nanogpt", "ssm", "llama"])
def model(request):
    if request.param == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes))
    variants = {"attention_variant": ["causal", "ssm"]} if request.param == "ssm" else {"use_qk_norm": True}
    config = NanoGPTConfig(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5, **variants)
    return NanoGPTForCausalLM(config)


def check(row, values):
    values = np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in values])
    assert row["count"] == values.size
    assert row["mean"] == pytest.approx(values.mean(), rel=1e-6, abs=1e-9)
    assert row["stdev"] == pytest.approx(values.std(), rel=1e-6)
    assert row["abs_max"] == pytest.approx(np.abs(values).max(), rel=1e-5)
    if row["stdev"] > 1e-7:
        assert row["kurtosis"] == pytest.approx(scipy.stats.kurtosis(values), rel=1e-4, abs=1e-4)


def test_weights_equal_direct_computation(model):
    rows = weight_statistics(model)
    parameters = dict(model.named_parameters())
    assert rows["name"] == list(parameters)
    for row in rows:
        check(row, [parameters[row["name"]].detach().numpy()])
        assert row["shape"] == "x".join(map(str, parameters[row["name"]].shape))


def outputs_without_padding(model, names, block_size):
    """What modules compute of each block alone; of a tuple, its first element."""
    seen = {name: [] for name in names}

    def keep(name):
        return lambda module, args, out: seen[name].append((out[0] if isinstance(out, tuple) else out).numpy())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        for first in range(0, len(IDS), block_size):
            model.eval()(torch.tensor([IDS[first : first + block_size]]))
    for handle in handles:
        handle.remove()
    return seen


def test_activations_equal_direct_computation_without_padding(model):
    rows = activation_statistics(model, block_batches(IDS, 16, batch_size=4))  # the last row is padded
    names = list(rows["name"])
    seen = outputs_without_padding(model, names, 16)
    for row in rows:
        check(row, seen[row["name"]])
        assert row["type"] == type(model.get_submodule(row["name"])).__name__


def test_the_model_is_left_as_it_was(model):
    model.train()
    activation_statistics(model, block_batches(IDS, 16))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules() if "Layer" not in type(module).__name__)


def test_patterns_choose_modules(model):
    pattern = next(name for name, _ in model.named_modules() if name.endswith("1.mlp")).replace("1.mlp", "*.mlp")
    rows = activation_statistics(model, block_batches(IDS, 16), [pattern, "lm_head"])
    assert [name.rsplit(".", 1)[-1] for name in rows["name"]] == ["mlp", "mlp", "lm_head"]
    assert rows["count"][-1] == len(IDS) * 30
    with pytest.raises(ValueError, match="no module is called 'nothing'"):
        activation_statistics(model, block_batches(IDS, 16), ["nothing"])
    with pytest.raises(ValueError, match="no batch"):
        activation_statistics(model, [])


def test_tuples_and_fields_give_their_first_tensor(model):
    base = model.base_model_prefix
    whole, head = activation_statistics(model, block_batches(IDS, 16), [base, "lm_head"])
    assert whole["count"] == len(IDS) * 16


def test_blocks_cover_the_text_once():
    batches = list(block_batches(list(range(1, 12)), 4, batch_size=2))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, 2, 3, 4], [5, 6, 7, 8]], [[9, 10, 11]]]
    (batch,) = block_batches(list(range(1, 12)), 4, batch_size=3)
    assert batch["input_ids"].tolist()[2] == [9, 10, 11, 0]
    assert batch["attention_mask"].tolist()[2] == [1, 1, 1, 0]


def test_outputs_of_unknown_shape_are_left_out_under_padding(caplog):
    class Turned(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(0, 1)

    config = LlamaConfig(vocab_size=30, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    model.odd = Turned(4, 4)
    model.model.norm.register_forward_hook(lambda module, args, out: model.odd(out) is None or out)
    assert "odd" in activation_statistics(model, block_batches(IDS[:48], 16))["name"]
    assert "odd" not in activation_statistics(model, block_batches(IDS, 16))["name"]
    assert "odd" in caplog.text
