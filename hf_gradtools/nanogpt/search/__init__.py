"""Sweeps over an exploration grammar and greedy search by gain per cost, on Optuna; resumable, on several machines.

```python
outcomes = run_sweep(read_exploration("explorations/softmax.yaml"), "out/softmax", workers=2)
results_table("out/softmax").sort("best_val_loss")
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.search.exploration import Run, read_exploration
    from hf_gradtools.nanogpt.search.greedy import SearchSettings, greedy_search
    from hf_gradtools.nanogpt.search.plots import plot_search
    from hf_gradtools.nanogpt.search.pool import Pool
    from hf_gradtools.nanogpt.search.results import results_table
    from hf_gradtools.nanogpt.search.sweep import run_sweep

__all__ = [
    "Pool",
    "Run",
    "SearchSettings",
    "greedy_search",
    "plot_search",
    "read_exploration",
    "results_table",
    "run_sweep",
]

_MODULES = {
    "Pool": "pool",
    "Run": "exploration",
    "SearchSettings": "greedy",
    "greedy_search": "greedy",
    "plot_search": "plots",
    "read_exploration": "exploration",
    "results_table": "results",
    "run_sweep": "sweep",
}

__getattr__ = lazy_names(__name__, _MODULES)
