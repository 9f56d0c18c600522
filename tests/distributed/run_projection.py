"""Two ranks project a dataset; started by ghost/gradproj/test_project.py through torchrun."""

import os
import sys

import torch.distributed as dist

from tests.ghost.gradproj.test_project import project


if __name__ == "__main__":
    dist.init_process_group("gloo")
    project(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
