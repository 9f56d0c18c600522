"""Checkpoints below a folder, by validation loss: `python inspect_checkpoints.py --directory out`."""

from hf_gradtools.nanogpt.analysis.cli import inspect_main


if __name__ == "__main__":
    inspect_main()
