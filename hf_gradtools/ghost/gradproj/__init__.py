"""Gradients of a whole corpus: projected, stored, searched."""
