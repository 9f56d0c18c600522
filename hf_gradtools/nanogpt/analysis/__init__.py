"""What checkpoints, weights and activations look like."""
