"""Labelled answers: a model's own to questions, and true and false claims; what a detector learns from."""
