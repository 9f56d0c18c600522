import pytest
import torch
from torch import nn

from hf_gradtools.core.inference import evaluating, free_cached_memory, is_out_of_memory


def test_each_module_gets_back_the_mode_that_it_had():
    one, two = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Dropout()
    one[0].eval()
    with evaluating(one, two):
        assert not any(module.training for root in (one, two) for module in root.modules())
    assert [module.training for module in (one, one[0], one[1], two)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected
    free_cached_memory()
