"""Imports every file of components, which registers their variants."""

from .activations import Activation
from .attention import TokenMixer
from .latent import LatentAttention
from .linear import RoundedLinear
from .mlp import FeedForward
from .norms import Norm
from .positions import Position
from .recurrent import SelectiveStateSpace
from .registry import VARIANTS, Component, register
from .softmax import Softmax


__all__ = [
    "VARIANTS",
    "Activation",
    "Component",
    "FeedForward",
    "LatentAttention",
    "Norm",
    "Position",
    "RoundedLinear",
    "SelectiveStateSpace",
    "Softmax",
    "TokenMixer",
    "register",
]
