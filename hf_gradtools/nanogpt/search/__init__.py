"""Sweeps over an exploration grammar and greedy search by gain per cost, on Optuna; resumable, on several machines."""
