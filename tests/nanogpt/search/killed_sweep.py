"""A sweep to be killed: `python killed_sweep.py FOLDER WORKERS RUNS SECONDS [own]`."""

import sys
from pathlib import Path

from hf_gradtools.nanogpt.search.sweep import run_sweep
from tests.nanogpt.search.stub_runs import stub


def configs(runs, seconds):
    return [{"x": x, "seconds": seconds} for x in range(1, runs + 1)]


if __name__ == "__main__":
    folder, workers, runs, seconds, *own = sys.argv[1:]
    run_sweep(configs(int(runs), float(seconds)), Path(folder), stub, workers=int(workers), in_process=not own)
