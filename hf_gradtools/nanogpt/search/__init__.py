"""Sweeps and greedy search over configurations, on Optuna."""
