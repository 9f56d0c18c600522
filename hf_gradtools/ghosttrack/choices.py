"""What a detector can be told to look at, for its own configuration and for that of a run; imports nothing heavy."""

from __future__ import annotations


__all__ = ["FEATURES", "SCOPES", "default_classifier"]

FEATURES = ("latents", "tracks_seed", "tracks_enlarged", "latents+tracks")
SCOPES = ("answer", "text")


def default_classifier(features: str) -> str:
    """What suits a feature set: a random forest for GhostTrack's 26, as it has, and else logistic regression."""
    return "random_forest" if features == "tracks_seed" else "logistic_regression"
