"""Samples from a trained model: `python sample.py --out_dir out --start "ROMEO:" --colorize_output`."""

from hf_gradtools.nanogpt.sampling.cli import main


if __name__ == "__main__":
    main()
