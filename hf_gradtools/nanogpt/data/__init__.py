"""Token files for nanoGPT-style training: made from text, read as blocks."""
