"""Trains the baseline, which reads the context in its prompt; takes the same arguments, those of the memory unused."""

import sys

from hf_gradtools.gradmem.training.cli import train_main


if __name__ == "__main__":
    train_main(["--vanilla", *sys.argv[1:]])
