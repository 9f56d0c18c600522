"""A greedy search to be killed: `python killed_search.py FOLDER WORKERS SECONDS`."""

import sys
from pathlib import Path

from hf_gradtools.nanogpt.search.greedy import SearchSettings, greedy_search
from hf_gradtools.nanogpt.search.pool import Pool
from tests.nanogpt.search.stub_runs import surface


BASELINE = {"n_embd": 16, "n_head": 4, "n_layer": 2, "mlp_size": [16, 16], "lr": 0.001}
SETTINGS = SearchSettings({"n_embd": 4, "n_head": 1, "mlp_size": 8}, iterations=2, direction="both")
ROUNDS = 4


def search(folder, workers=1, seconds=0.0, settings=SETTINGS, rounds=ROUNDS, storage=None, **changes):
    pool = Pool(surface, folder, workers=workers, in_process=True, storage=storage)
    baseline = {**BASELINE, **({"seconds": seconds} if seconds else {}), **changes}
    log = folder / "log.yaml"
    return greedy_search(baseline, settings, pool, num_iterations=rounds, results_file=log, layer_lists=["mlp_size"])


if __name__ == "__main__":
    folder, workers, seconds = sys.argv[1:]
    search(Path(folder), int(workers), float(seconds))
