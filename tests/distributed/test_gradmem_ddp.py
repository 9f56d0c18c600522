"""Gradients through a write on two gloo processes against one process that sees all samples."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.run_gradmem import CASES, train
from tests.distributed.test_distributed import torchrun
from tests.gradmem.tiny import batch


pytestmark = pytest.mark.distributed


def test_two_ranks_have_the_gradient_of_one_process(tmp_path):
    torchrun("tests.distributed.run_gradmem", tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    alone = train(lambda one, **_: one, batch())
    for case in CASES:
        for ours, theirs, expected in zip(first[case], second[case], alone[case], strict=True):
            assert ours.keys() == theirs.keys() == expected.keys()
            for name, grad in expected.items():
                assert torch.equal(ours[name], theirs[name]), (case, name)
                assert (ours[name] - grad).norm() <= 1e-9 * grad.norm(), (case, name)
