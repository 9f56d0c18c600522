"""Extracts in a child process that is killed again and again; started by test_store.py as a script.

The parent imports everything once and forks, so an attempt costs no import.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from hf_gradtools.sae.extraction import extract
from tests.sae.tiny_models import llama, make_sequences


NAMES = ["layers.0", "layers.1", "layers.2"]
SEQUENCES = 120


def run(path: Path) -> None:
    """Writes 13 shards of each hookpoint."""
    extract(
        llama(), make_sequences(SEQUENCES), NAMES, path, batch_size=2, rows_per_shard=150, model_name="tiny",
        progress=False,
    )  # fmt: skip


def main(path: Path, kills: int, seconds: float) -> None:
    """Kills at moments spread over the `seconds` that a whole run takes, while there is something to kill."""
    moments = random.Random(0)
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            run(path)
            os._exit(0)
        if kill < kills:
            time.sleep(moments.uniform(0.0, 2 * seconds / kills))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if kill < kills:
            print("killed" if os.WIFSIGNALED(status) else "ended")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
