"""Improve a configuration greedily, by gain per cost; explorations/baseline.yaml is one to begin with."""

from hf_gradtools.nanogpt.search.cli import hyperparam_search_main


if __name__ == "__main__":
    hyperparam_search_main()
