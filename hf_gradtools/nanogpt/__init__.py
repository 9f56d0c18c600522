"""Decoder-only language models whose parts are chosen by name, and what they cost in hardware."""
