"""Whether autoencoders fit the activations that they are to read."""

from __future__ import annotations

from collections.abc import Mapping

from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.shuffling import ActivationSource


__all__ = ["check_any", "check_fit"]


def check_any(saes: Mapping[str, SAE]) -> None:
    """ValueError if there is no autoencoder."""
    if not saes:
        raise ValueError("saes is empty; need at least 1. Pass load_many(...), or {'layers.5': sae}.")


def check_fit(saes: Mapping[str, SAE], source: ActivationSource) -> None:
    """ValueError if an autoencoder has another width than the activations at its hookpoint."""
    for name, sae in saes.items():
        if source.d_in(name) != sae.config.d_in:
            raise ValueError(
                f"saes[{name!r}] has d_in={sae.config.d_in}, the activations there have {source.d_in(name)}. "
                "Pass the autoencoder that was trained at this hookpoint."
            )
