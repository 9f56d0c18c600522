"""A loss that is no number ends the run with the step, the last good checkpoint and the remedy."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gradtools.nanogpt.training import train
from tests.nanogpt.training.reference import MODEL, options, plain_losses


@pytest.mark.parametrize("interval", [2, 100])
def test_it_names_step_checkpoint_and_remedy(interval, dataset, tmp_path):
    """The weights are lost in the second update: an evaluation after it sees that, or the loss after it."""
    run = options(dataset, tmp_path / "out", learning_rate=1e25, warmup_iters=0, grad_clip=0, eval_interval=interval)
    assert [math.isfinite(loss) for loss in plain_losses_unclipped(run)[:3]] == [True, True, False]
    with pytest.raises(FloatingPointError) as raised:
        train(run, MODEL)
    message = str(raised.value)
    assert message.startswith(
        "the validation loss is nan at iteration 2." if interval == 2 else "the loss is nan at iteration 3."
    )
    assert "checkpoint-0, and nothing was written after it" in message
    assert "Lower learning_rate (1e+25), set grad_clip=1.0 (it is off)" in message
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-0")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    good, published = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out/checkpoint-0", "out"))
    assert good == published


def plain_losses_unclipped(run):
    clipped = run.grad_clip
    run.grad_clip = math.inf
    try:
        return plain_losses(run, MODEL, 6)
    finally:
        run.grad_clip = clipped


def test_weights_spoiled_after_a_good_loss_are_not_saved(dataset, tmp_path, monkeypatch):
    """The last update before an evaluation spoils the weights: the evaluation sees it first."""
    step = torch.optim.AdamW.step
    calls = []

    def spoil(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 8:
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    run = options(dataset, tmp_path / "out")
    with pytest.raises(
        FloatingPointError, match=r"validation loss is nan at iteration 8. .*checkpoint-4, and nothing"
    ):
        train(run, MODEL)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-4"]
    monkeypatch.undo()
    assert train(options(dataset, tmp_path / "out", init_from="resume"), MODEL).iters == 12


def test_losses_read_at_intervals_still_name_the_iteration(dataset, tmp_path):
    """As on an accelerator, where reading a loss in each iteration would wait for it."""
    from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
    from hf_gradtools.nanogpt.data import TokenFolder
    from hf_gradtools.nanogpt.training.arguments import training_arguments
    from hf_gradtools.nanogpt.training.trainer import BlockTrainer

    run = options(dataset, tmp_path / "out", gradient_accumulation_steps=2)
    data = TokenFolder(dataset)
    model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=data.vocab_size, **MODEL))
    trainer = BlockTrainer(model, training_arguments(run), run, data, 8, print)
    good, bad = torch.tensor(1.0), torch.tensor(math.inf)
    trainer.state.global_step = 4  # the fifth iteration is under way: it has had both batches
    trainer._losses = [good, good, good, bad, good, good]
    with pytest.raises(FloatingPointError, match="loss is inf at iteration 4. No checkpoint was written"):
        trainer._check_losses()
