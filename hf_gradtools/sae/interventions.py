"""Changes of a model's hidden states while it runs: reconstructed, steered along a feature, or without some features.

B sequences, S positions, D = d_in, F = d_sae. Each change is a context manager whose hooks are gone when its block
ends, by whatever way. They nest, and work in training, in evaluation and in `generate` with a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradtools.sae.hookpoints import base_model, resolve
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.sparse import decode


__all__ = ["ablate", "edit", "reconstruct", "replace", "steer"]


@contextlib.contextmanager
def edit(
    model: PreTrainedModel, changes: Mapping[str, Callable[[Tensor], Tensor]], *, skip_positions: int = 0
) -> Iterator[None]:
    """Puts functions of hidden states in their place, in every forward of the base model inside the block.

    Args:
        model (`PreTrainedModel`): a causal LM or its base model.
        changes (`Mapping[str, Callable]`): by hookpoint, from hidden states `[B, S, D]` to others of the same shape;
            they are cast to the model's type.
        skip_positions (`int`, defaults to 0): first positions of the sequences that stay as they are, counted from
            where the cache begins.

    Raises:
        ValueError: if there is no change, a hookpoint does not exist, or `skip_positions` is negative.
    """
    if not changes:
        raise ValueError("changes is empty; need at least 1 hookpoint. Pass {'layers.0': function}.")
    if skip_positions < 0:
        raise ValueError(f"skip_positions={skip_positions} is negative. Pass 0, or 1 for the attention sink.")
    modules = {hookpoint: resolve(model, hookpoint) for hookpoint in changes}
    past = 0

    def note_past(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal past
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())

    def hook_of(hookpoint: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            state = output if isinstance(output, Tensor) else _first(output, hookpoint)
            changed = _changed(state, changes[hookpoint], max(0, skip_positions - past), hookpoint)
            if isinstance(output, Tensor):
                return changed
            return [changed, *output[1:]] if isinstance(output, list) else (changed, *output[1:])

        return hook

    with contextlib.ExitStack() as handles:
        handles.callback(base_model(model).register_forward_pre_hook(note_past, with_kwargs=True).remove)
        for hookpoint, module in modules.items():
            handles.callback(module.register_forward_hook(hook_of(hookpoint)).remove)
        yield


def replace(
    model: PreTrainedModel, saes: Mapping[str, SAE], *, keep_error: bool = False, skip_positions: int = 1
) -> contextlib.AbstractContextManager[None]:
    """Hidden states become their reconstructions.

    Args:
        model (`PreTrainedModel`): a causal LM or its base model.
        saes (`Mapping[str, SAE]`): by hookpoint.
        keep_error (`bool`, defaults to `False`): add what the reconstruction lacks, as a constant: outputs stay as
            they were but for rounding, while gradients pass through the latents alone.
        skip_positions (`int`, defaults to 1): first positions left as they are: attention sinks, which autoencoders
            are not trained on.

    Raises:
        ValueError: if there is no autoencoder, or a hookpoint does not exist.
    """

    def change_of(sae: SAE) -> Callable[[Tensor], Tensor]:
        def change(state: Tensor) -> Tensor:
            reconstruction = reconstruct(sae, state)
            return reconstruction + (state - reconstruction).detach() if keep_error else reconstruction

        return change

    return edit(model, {name: change_of(sae) for name, sae in saes.items()}, skip_positions=skip_positions)


def steer(
    model: PreTrainedModel,
    sae: SAE,
    feature: int,
    strength: float,
    *,
    hookpoint: str | None = None,
    skip_positions: int = 0,
) -> contextlib.AbstractContextManager[None]:
    """Adds `strength` times a feature's decoder row to the hidden state of every position.

    Args:
        model (`PreTrainedModel`): a causal LM or its base model.
        sae ([`SAE`]): whose feature it is.
        feature (`int`): its number.
        strength (`float`): in the units of the feature's activations; negative steers away from it.
        hookpoint (`str`, *optional*): where; default `sae.config.hookpoint`.
        skip_positions (`int`, defaults to 0): first positions left as they are.

    Raises:
        ValueError: if there is no such feature or hookpoint.
    """
    _check_features(sae, [feature], "feature")

    def change(state: Tensor) -> Tensor:
        return state + (strength * sae.W_dec[feature]).to(state)

    return edit(model, {_place(sae, hookpoint): change}, skip_positions=skip_positions)


def ablate(
    model: PreTrainedModel,
    sae: SAE,
    features: int | Sequence[int],
    *,
    hookpoint: str | None = None,
    skip_positions: int = 1,
) -> contextlib.AbstractContextManager[None]:
    """Takes what some features write out of the hidden states; everything else stays, the error too.

    Args:
        model (`PreTrainedModel`): a causal LM or its base model.
        sae ([`SAE`]): whose features they are.
        features (`int` or `Sequence[int]`): their numbers.
        hookpoint (`str`, *optional*): where; default `sae.config.hookpoint`.
        skip_positions (`int`, defaults to 1): first positions left as they are.

    Raises:
        ValueError: if there is no such feature or hookpoint.
    """
    numbers = [features] if isinstance(features, int) else list(features)
    _check_features(sae, numbers, "features")
    ablated = torch.zeros(sae.config.d_sae, dtype=torch.bool)
    ablated[numbers] = True

    def change(state: Tensor) -> Tensor:
        latents = sae.encode_sparse(state.to(sae.W_dec.device))
        chosen = ablated.to(latents.indices.device)[latents.indices]
        values = latents.values[chosen]
        written = decode(values, sae.W_dec.to(values.dtype), latents.pattern.select(chosen))
        return state - written.view(state.shape).to(state)

    return edit(model, {_place(sae, hookpoint): change}, skip_positions=skip_positions)


def reconstruct(sae: SAE, state: Tensor) -> Tensor:
    """The reconstruction of hidden states `[..., D]`, in their shape, type and device."""
    latents = sae.encode_sparse(state.to(sae.W_dec.device))
    return sae.decode(latents).view(state.shape).to(state)


def _changed(state: Tensor, change: Callable[[Tensor], Tensor], skip: int, hookpoint: str) -> Tensor:
    rest = state[:, skip:]
    if not rest.shape[1]:
        return state
    changed = change(rest)
    if changed.shape != rest.shape:
        raise ValueError(
            f"the change at hookpoint={hookpoint!r} made {list(changed.shape)} of {list(rest.shape)}; need the same "
            "shape. Return a tensor like the one given."
        )
    changed = changed.to(state)
    return torch.cat([state[:, :skip], changed], dim=1) if skip else changed


def _first(output: Any, hookpoint: str) -> Tensor:
    if not isinstance(output, (tuple, list)) or not output or not isinstance(output[0], Tensor):
        raise ValueError(
            f"missing hidden state: hookpoint={hookpoint!r} puts out {type(output).__name__}; need a tensor, or a "
            "tuple that begins with one. Pass a decoder block ('layers.0') or a module that returns hidden states."
        )
    return output[0]


def _place(sae: SAE, hookpoint: str | None) -> str:
    place = hookpoint or sae.config.hookpoint
    if place is None:
        raise ValueError("hookpoint=None, and the SAE's config names none. Pass hookpoint='layers.5', where it reads.")
    return place


def _check_features(sae: SAE, features: Sequence[int], name: str) -> None:
    if not features:
        raise ValueError(f"{name} is empty; need at least 1 number below d_sae={sae.config.d_sae}.")
    for feature in features:
        if not 0 <= feature < sae.config.d_sae:
            raise ValueError(f"{name}={feature} is not a feature. Pass 0 ... {sae.config.d_sae - 1}.")
