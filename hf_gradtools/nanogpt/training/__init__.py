"""Training of nanoGPT variants with Trainer: options, exact resume, best checkpoint."""
