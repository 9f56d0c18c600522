"""The naive way: `torch.func.grad` of one unpadded sample at a time in float64, then the projection written out."""

from __future__ import annotations

import copy

import torch

from hf_gradtools.core.projection import project_matrix


def unpadded(row):
    """A row without its padding, as a batch of one."""
    kept = [i for i, m in enumerate(row.get("attention_mask", [1] * len(row["input_ids"]))) if m]
    names = ("input_ids", "labels")
    return {k: torch.tensor([[row[k][i] for i in kept] if len(row[k]) > 1 else row[k]]) for k in names}


def model_loss(model, batch):
    return model(**batch, use_cache=False)["loss"]


def sample_gradient(model, batch, loss_fn=model_loss):
    """{name: gradient} in the parameters that need one, of one sample's loss."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return loss_fn(self.inner, batch)

    wrapped = Loss()

    def loss(values):
        return torch.func.functional_call(wrapped, {f"inner.{n}": v for n, v in values.items()}, (batch,))

    return torch.func.grad(loss)(parameters)


def project_by_hand(projector, grads, factors=None):
    """`[dim]`: P_outᵀ g P_in of every block, side by side or put through the sketch, one matrix product each."""
    projection = projector.projection
    names = dict(projector.model.named_parameters())
    owners = {p: (layer, name) for layer in reversed(projector.layers) for name, p in layer.parameters.items()}
    result = torch.zeros(projection.dim, dtype=torch.float64)
    for name, p in names.items():
        if p not in owners:
            continue
        layer, local = owners[p]
        block = f"{layer.name}.{local}".lstrip(".")
        bases = tuple(None if b is None else b.double() for b in projection.bases[block])
        grad = grads[name].double() if factors is None else grads[name].double() * factors[p].double()
        flat = project_matrix(layer.rule.as_matrix(local, grad), bases).flatten()
        if projection.sketches:
            result += sketch_matrix(projection.sketches[block], len(flat)) @ flat
        else:
            result[projection.slices[block]] += flat
    return result


def sketch_matrix(sketch, size):
    """The sketch as a dense matrix `[dim, size]`, from its action on each unit vector."""
    return sketch(torch.eye(size, dtype=torch.float64)).T


def expected_rows(projector, rows, *, dtype=torch.float64, loss_fn=model_loss, as_batch=unpadded, factors=None):
    """`[N, dim]` in float64."""
    twin = copy.deepcopy(projector.model).to(dtype).eval()
    if not any(p.requires_grad for p in twin.parameters()):
        for p, q in zip(projector.model.parameters(), twin.parameters(), strict=True):
            q.requires_grad_(p in {v for layer in projector.layers for v in layer.parameters.values()})
    found = []
    for i in range(len(rows)):
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in as_batch(rows[i]).items()}
        found.append(project_by_hand(projector, sample_gradient(twin, batch, loss_fn), factors))
    return torch.stack(found)


def error(mine, theirs):
    return float((mine.double() - theirs).abs().max() / theirs.abs().max())
