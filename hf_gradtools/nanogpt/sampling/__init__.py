"""Text from a trained model, coloured by its confidence, and its scores on benchmarks."""
