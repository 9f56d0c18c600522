"""Trains a nanoGPT model: python examples/nanogpt/train.py --help"""

from hf_gradtools.nanogpt.training.cli import main


if __name__ == "__main__":
    main()
