"""GradMem under DistributedDataParallel on two ranks; started by test_gradmem_ddp.py through torchrun. Writes the
gradients of its rank and leaves hard."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.gradmem.references import exact_norms
from tests.gradmem.tiny import Fields, batch, build


CASES: dict[str, Fields] = {
    "default": {},
    "kept": {"recompute_write": False},
    "everything": {"case": "everything"},
    "Adam": {"case": "Adam", "K": 3},
    "first": {"grad_mode": "first"},
    "last step": {"last_k_second_order": 1},
    "frozen": {"freeze_backbone": True, "use_write_head": True},
    "none": {"grad_mode": "none"},
}
UNUSED = {"everything", "none"}  # looked for, as Trainer does
STEPS = 2


@exact_norms()
def train(wrap, rows) -> dict[str, list[torch.Tensor]]:
    """Of every case the gradients of some steps of plain descent, in double precision."""
    found = {}
    for name, fields in CASES.items():
        one = build(**fields)
        wrapped, found[name] = wrap(one.train(), find_unused_parameters=name in UNUSED), []
        for _ in range(STEPS):
            wrapped.zero_grad()
            wrapped(**rows).loss.backward()
            grads = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
            found[name].append(grads)
            with torch.no_grad():
                for parameter in one.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=1e-3 / (1 + parameter.grad.norm()))
    return found


def main(path: Path) -> None:
    distributed.init_process_group("gloo")
    rank, whole = distributed.get_rank(), batch()
    rows = {name: value.chunk(2)[rank] for name, value in whole.items()}
    torch.save(train(DistributedDataParallel, rows), path / f"rank{rank}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
