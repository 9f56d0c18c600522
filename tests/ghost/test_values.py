"""In-run values against finite differences over real optimizer steps, and against leaving samples out."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from hf_gradtools import GhostDotProd
from hf_gradtools.ghost.optimizers import exact_derivative, frozen_derivative, unwrap_optimizer
from tests.ghost.reference import as_batch, llama, rows, train


STEPS_BEFORE = 5


class Regression(nn.Module):
    """A small float64 network with a curved loss, its optimizer some steps into training."""

    def __init__(self, make_optimizer):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
        for p in self.net.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5
        self.x, self.y = torch.randn(7, 5, generator=g).double(), torch.randint(0, 3, (7,), generator=g)
        self.val_x, self.val_y = torch.randn(6, 5, generator=g).double(), torch.randint(0, 3, (6,), generator=g)
        self.optimizer = make_optimizer(self.net.parameters())
        for _ in range(STEPS_BEFORE):
            self.optimizer.zero_grad()
            self.train_loss(torch.ones(7)).backward()
            self.optimizer.step()
        self.optimizer.zero_grad()

    def train_loss(self, weights):
        losses = nn.functional.cross_entropy(self.net(self.x), self.y, reduction="none")
        return (losses * weights).sum() / len(self.y)

    def val_loss(self):
        return nn.functional.cross_entropy(self.net(self.val_x), self.val_y)

    def after_step(self, weights, lr):
        """Validation loss after the real optimizer's step on the weighted batch."""
        twin = copy.deepcopy(self)
        twin.optimizer = type(self.optimizer)(twin.net.parameters())
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        twin.optimizer.param_groups[0]["lr"] = lr
        twin.train_loss(weights).backward()
        twin.optimizer.step()
        return float(twin.val_loss())

    def slope(self, sample, weight, lr, eps=1e-4):
        """d(validation loss after the step)/d(weight of the sample), all samples' weights at `weight`."""
        up, down = torch.full((7,), weight).double(), torch.full((7,), weight).double()
        up[sample] += eps
        down[sample] -= eps
        return (self.after_step(up, lr) - self.after_step(down, lr)) / (2 * eps)

    def engine(self, **kwargs):
        return GhostDotProd(self.net, loss_fn=lambda net, _: self.val_loss(), **kwargs)


def slopes(problem, weight, lr):
    return torch.tensor([problem.slope(i, weight, lr) for i in range(7)], dtype=torch.float64)


def scored(problem, scale=None, **kwargs):
    with problem.engine(**kwargs) as engine:
        engine.validate([0], scale)
        problem.train_loss(torch.ones(7)).backward()
        return engine.scores(), engine


@pytest.mark.parametrize(
    "kwargs", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}]
)
def test_sgd_values_are_the_slope_of_the_real_step(kwargs):
    problem = Regression(lambda p: torch.optim.SGD(p, lr=0.1, **kwargs))
    scores, _ = scored(problem, lambda p: frozen_derivative(problem.optimizer, p))
    lr = 1e-7
    torch.testing.assert_close(-lr * scores.dots[0], slopes(problem, 1.0, lr), rtol=1e-3, atol=1e-13)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_exact_adam_values_are_the_slope_of_the_real_step(make, decay):
    problem = Regression(lambda p: make(p, lr=1e-2, weight_decay=decay))
    with problem.engine(retain=True) as engine:
        engine.validate([0])
        problem.train_loss(torch.ones(7)).backward()
        scores = engine.scores()
        factors = {p: exact_derivative(problem.optimizer, p, p.grad) for p in engine.parameters}
        exact = engine.rescored(scores, [{p: engine.target(p)[0] * f for p, f in factors.items()}])
    lr = 1e-7
    torch.testing.assert_close(-lr * exact.dots[0], slopes(problem, 1.0, lr), rtol=1e-3, atol=1e-12)


def test_frozen_adam_values_are_the_slope_of_a_step_that_barely_moves_the_second_moment():
    problem = Regression(lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.999)))
    for state in problem.optimizer.state.values():  # far into training: one gradient is 1e-7 of the second moment
        state["step"].fill_(1e7)
    problem.optimizer.param_groups[0]["betas"] = (0.9, 1 - 1e-8)
    scores, _ = scored(problem, lambda p: frozen_derivative(problem.optimizer, p))
    lr = 1e-7
    torch.testing.assert_close(-lr * scores.dots[0], slopes(problem, 1.0, lr), rtol=1e-3, atol=1e-12)


def test_second_order_value_is_the_mean_slope_along_the_step():
    """Aumann-Shapley: the value is the slope averaged over the update's way from nothing to whole."""
    problem = Regression(lambda p: torch.optim.SGD(p, lr=0.1))
    lr = 0.02
    with problem.engine(retain=True, keep_grads=True) as engine:
        engine.validate([0])
        problem.train_loss(torch.ones(7)).backward()
        scores = engine.scores()
        gradient = engine.batch_gradient()
        product = engine.hessian_product([0], [gradient[p] for p in engine.parameters])
        curvature = engine.rescore(dict(zip(engine.parameters, product, strict=True))).sum(0)
    value = -lr * scores.dots[0] + lr**2 / 2 * curvature
    along = sum(w * slopes(problem, c, lr) for w, c in [(1 / 6, 0.0), (4 / 6, 0.5), (1 / 6, 1.0)])
    torch.testing.assert_close(value, along, rtol=1e-3, atol=1e-6)
    assert (value - along).abs().max() < 0.1 * (-lr * scores.dots[0] - along).abs().max()
    gain = problem.after_step(torch.ones(7), lr) - float(problem.val_loss())
    assert float(value.sum()) == pytest.approx(gain, rel=1e-2)


def test_callback_second_order_and_optimizer_aware_columns(tmp_path):
    """The callback's columns equal the same quantities by autograd at the recorded weights."""
    model, val = llama(), rows(5, seed=9)
    callback, recorder, trainer = train(
        model, rows(9), val, tmp_path, second_order=True, args={"optim": "sgd", "max_steps": 2, "learning_rate": 0.1}
    )
    data = callback.dataset.with_format("numpy")[:]
    for n, step in enumerate(recorder.steps, start=1):
        expected = hessian_terms(model, step, as_batch(val))
        mine = torch.tensor(data["second_order"][data["step"] == n]).double()
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    lr = data["learning_rate"]
    assert data["value"] == pytest.approx(-lr * data["dot_product"] + lr**2 / 2 * data["second_order"], rel=1e-4)


def hessian_terms(model, step, val):
    from tests.ghost.reference import per_sample_gradients, sample_losses

    model = copy.deepcopy(model)
    model.load_state_dict(step["weights"])
    model = model.double().eval()
    model.set_attn_implementation("eager")
    (batch, _), parameters = step["batches"][0], list(model.parameters())
    losses = sample_losses(model, batch, batch["num_items_in_batch"])
    grads = list(per_sample_gradients(model, losses))
    update = [sum(g) for g in zip(*grads, strict=True)]
    loss = sample_losses(model, val, (val["labels"][:, 1:] != -100).sum()).sum()
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    product = torch.autograd.grad(sum((g * u).sum() for g, u in zip(first, update, strict=True)), parameters)
    return torch.stack([sum((g * h).sum() for g, h in zip(sample, product, strict=True)) for sample in grads])


@pytest.mark.parametrize("aware", [True, "exact"])
def test_optimizer_aware_values_order_samples_as_leaving_them_out_does(aware):
    """Adam-aware values against validation loss after the real AdamW step without the sample (float64)."""
    torch.manual_seed(0)
    mine, raw = [], []
    for seed in range(4):
        problem = trained_lm(seed, steps=30)
        truth, values = problem.left_out(), problem.values(aware)
        mine.append(spearmanr(truth, values).statistic)
        raw.append(spearmanr(truth, problem.values(False)).statistic)
    assert sum(mine) / 4 >= 0.9
    assert sum(mine) > sum(raw)


class trained_lm:  # noqa: N801 - reads as a verb phrase at the call
    """A tiny language model some AdamW steps into training, one batch of 16 about to be trained on."""

    def __init__(self, seed, steps):
        self.model = llama().double()
        self.lr = 3e-3
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr)
        for i in range(steps):
            self.loss(as_batch(self.rows(16, 1000 * seed + i))).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.batch, self.val = as_batch(self.rows(16, 7777 + seed)), as_batch(self.rows(16, 8888 + seed))

    @staticmethod
    def rows(n, seed):
        """Half arithmetic sequences, half random tokens: samples that agree and samples that do not."""
        data = rows(n, seed=seed, length=(10, 10)).to_list()
        for i, row in enumerate(data[: n // 2]):
            ids = [(row["input_ids"][0] + (1 + i % 2) * t) % 66 + 1 for t in range(10)]
            row.update(input_ids=ids, labels=ids)
        from datasets import Dataset

        return Dataset.from_list(data)

    def loss(self, batch, keep=None):
        from tests.ghost.reference import sample_losses

        losses = sample_losses(self.model, batch, (batch["labels"][:, 1:] != -100).sum())
        return losses.sum() if keep is None else losses[keep].sum()

    def left_out(self):
        state, weights = copy.deepcopy(self.optimizer.state_dict()), copy.deepcopy(self.model.state_dict())
        after = []
        for i in [None, *range(16)]:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(copy.deepcopy(state))
            self.optimizer.zero_grad()
            self.loss(self.batch, None if i is None else [j for j in range(16) if j != i]).backward()
            self.optimizer.step()
            with torch.no_grad():
                after.append(float(self.loss(self.val)))
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        self.optimizer.zero_grad()
        return torch.tensor([after[0] - x for x in after[1:]])

    def values(self, aware):
        optimizer = unwrap_optimizer(self.optimizer)
        scale = (lambda p: frozen_derivative(optimizer, p)) if aware is True else None
        with GhostDotProd(self.model, retain=True, loss_fn=lambda m, b: self.loss(b)) as engine:
            engine.validate([self.val], scale)
            self.loss(self.batch).backward()
            scores = engine.scores()
            if aware == "exact":
                target = {p: engine.target(p)[0] * exact_derivative(optimizer, p, p.grad) for p in engine.parameters}
                scores = engine.rescored(scores, [target])
        self.optimizer.zero_grad()
        return -self.lr * scores.dots[0]
