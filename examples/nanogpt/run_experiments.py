"""Run the experiments of a YAML or JSON file: `python run_experiments.py -c explorations/softmax.yaml --workers 2`."""

from hf_gradtools.nanogpt.search.cli import run_experiments_main


if __name__ == "__main__":
    run_experiments_main()
