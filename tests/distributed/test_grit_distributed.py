"""GRIT on two gloo processes against one process that sees all samples."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.run_grit import MEASURED_ONLY, train
from tests.distributed.test_distributed import torchrun
from tests.grit.reference import gap


pytestmark = pytest.mark.distributed


def test_two_ranks_are_one_process_with_their_batches_together(tmp_path):
    torchrun("tests.distributed.run_grit", tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    for run in ("cut", "uncut"):  # the ranks stay identical, whatever changes
        for name, weight in first[run]["weights"].items():
            assert torch.equal(weight, second[run]["weights"][name]), name
        for name, factors in first[run]["factors"].items():
            assert torch.equal(factors, second[run]["factors"][name]), name
    alone = train(tmp_path / "alone", 8, **MEASURED_ONLY)
    for name, factors in alone["factors"].items():
        assert first["uncut"]["samples"][name] == alone["samples"][name]
        assert gap(first["uncut"]["factors"][name], factors) < 1e-4, name
    assert first["cut"]["change"] == "masked"
    assert min(first["cut"]["ranks"].values()) < 6
    assert first["cut"]["shapes"] == first["cut"]["ranks"]  # tensors have shrunk when training ended
    alone = train(tmp_path / "alone", 8)
    assert alone["change"] == "physical"
    assert alone["ranks"] == first["cut"]["ranks"]
    for name, weight in alone["weights"].items():
        assert gap(weight, first["cut"]["weights"][name]) < 2e-2, name
