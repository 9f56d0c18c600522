"""The five phases of a GhostTrack run: each alone, for chosen layers, and going on where it was killed.

`extract`, `train`, `track`, `detect`, `evaluate`: what a phase leaves on disk is all that the next one reads. A phase
that is finished is skipped; one whose settings were changed says so, and `force` makes it anew.
"""
