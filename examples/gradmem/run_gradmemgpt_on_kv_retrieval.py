"""Trains a model that writes the context to its memory, and answers from that alone; see --help."""

from hf_gradtools.gradmem.training.cli import train_main


if __name__ == "__main__":
    train_main()
