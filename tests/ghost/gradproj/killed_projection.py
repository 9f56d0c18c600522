"""Projects in a child process that is killed again and again; started by test_project.py.

The parent imports everything once and forks, so an attempt costs no import.
"""

import os
import random
import signal
import sys
import time

from hf_gradtools.ghost.gradproj.projector import GradProjector
from tests.ghost.reference import llama, rows


def run(folder: str) -> None:
    projector = GradProjector(llama(), proj_rank_total=64)
    projector.project(rows(120), output_dir=folder, batch_size=2, window_rows=4)


def main(folder: str, kills: int) -> None:
    random.seed(0)
    begun = time.time()
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            run(folder)
            os._exit(0)
        # At most as long as it takes to set up, then some windows.
        time.sleep(random.uniform(0.05, 0.45))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run(folder)
    print(f"{time.time() - begun:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
