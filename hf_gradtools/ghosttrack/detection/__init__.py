"""Detectors: a model, its autoencoders and a classifier; their files, and transformers' pipeline."""
