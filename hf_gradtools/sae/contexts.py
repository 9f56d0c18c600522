"""Where each feature is most active, and on what else: examples of all features in one pass over a corpus.

N tokens of a block of sequences, M active (token, feature) pairs of them, F chosen features, n examples of each, W
tokens of a window. Examples are held by score, [F, n], and a block's pairs are sorted into them all at once. The
strongest examples score by activation; a fair sample of all comes from the same code with random numbers as scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_gradtools.core.inference import evaluating
from hf_gradtools.sae.fitting import check_any, check_fit
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.shuffling import ActivationSource
from hf_gradtools.sae.store import ActivationStore
from hf_gradtools.sae.streaming import ModelActivations


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["Contexts", "FeatureContexts", "top_contexts", "top_contexts_in_store"]

NONE = -1  # token id outside of the sequence; sequence and position of an example that does not exist
MIXERS = (-7046029254386353131, -4658895280553007687)  # odd, as int64


@dataclass(frozen=True)
class Contexts:
    """Examples of features, best score first. The token that an example is about is at `before` of its window.

    Args:
        values (`np.ndarray`): `[F, n]` float32, activations there; 0 where there is no such example.
        sequences (`np.ndarray`): `[F, n]` int64, or −1.
        positions (`np.ndarray`): `[F, n]` int64, in the sequence, or −1.
        token_ids (`np.ndarray`): `[F, n, W]` int64, −1 outside of the sequence.
        activations (`np.ndarray`): `[F, n, W]` float32, of the feature on each token of the window.
        before (`int`): tokens of a window before the one it is about.
    """

    values: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray
    activations: np.ndarray
    before: int

    @property
    def counts(self) -> np.ndarray:
        """`[F]`: how many examples there are."""
        return (self.sequences != NONE).sum(axis=1)


@dataclass(frozen=True)
class FeatureContexts:
    """Examples of an autoencoder's features.

    Args:
        hookpoint (`str`): where it reads.
        num_tokens (`int`): tokens that were looked at.
        features (`np.ndarray`): `[F]`, which features the rows of `top` and `sampled` belong to.
        top ([`Contexts`]): the strongest examples.
        sampled ([`Contexts`]): a fair sample of all tokens that activate the feature, in random order.
        density (`np.ndarray`): `[d_sae]` float64, share of tokens that activate each feature of the autoencoder.
    """

    hookpoint: str
    num_tokens: int
    features: np.ndarray
    top: Contexts
    sampled: Contexts
    density: np.ndarray


def top_contexts(
    model: PreTrainedModel,
    saes: Mapping[str, SAE],
    sequences: Tensor,
    *,
    n: int = 20,
    before: int = 20,
    after: int = 10,
    features: Sequence[int] | None = None,
    distinct: bool = True,
    batch_size: int = 8,
    skip_positions: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, FeatureContexts]:
    """Finds, on sequences of tokens, the strongest examples of each feature and a fair sample of its examples.

    Holds `2 · features · n · (before + 1 + after)` float32 of each autoencoder.

    Args:
        model (`PreTrainedModel`): a causal LM.
        saes (`Mapping[str, SAE]`): by hookpoint.
        sequences (`Tensor`): `[sequences, S]` token ids without padding.
        n (`int`, defaults to 20): examples of each feature, of both kinds.
        before (`int`, defaults to 20): tokens of a window before the one it is about.
        after (`int`, defaults to 10): tokens after it.
        features (`Sequence[int]`, *optional*): which features; default all.
        distinct (`bool`, defaults to `True`): at most one example of a feature from each sequence.
        batch_size (`int`, defaults to 8): sequences of a forward.
        skip_positions (`int`, defaults to 1): first positions that are not looked at.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the hidden states.
        seed (`int`, defaults to 0): of the sample.
        progress (`bool`, defaults to `True`): whether a bar shows.

    Returns:
        `dict[str, FeatureContexts]`: by hookpoint, in the order given.

    Raises:
        ValueError: if a number is out of range, or an autoencoder does not fit its hookpoint.
    """
    _check(saes, n, before, after, features)
    source = ModelActivations(model, sequences, list(saes), batch_size, dtype, skip_positions)
    search = _Search(n, before, after, distinct, seed)
    return search.run(source, saes, sequences, skip_positions, batch_size, features, progress)


def top_contexts_in_store(
    store: ActivationStore,
    saes: Mapping[str, SAE],
    *,
    n: int = 20,
    before: int = 20,
    after: int = 10,
    features: Sequence[int] | None = None,
    distinct: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, FeatureContexts]:
    """[`top_contexts`] of activations on disk, without the model; arguments as there.

    Raises:
        ValueError: if a number is out of range, or an autoencoder does not fit its hookpoint.
    """
    _check(saes, n, before, after, features)
    search = _Search(n, before, after, distinct, seed)
    sequences, (_, skip) = store.sequences(), store.place(0)
    return search.run(store.source(list(saes)), saes, sequences, skip, batch_size, features, progress)


@dataclass(frozen=True)
class _Search:
    n: int
    before: int
    after: int
    distinct: bool
    seed: int

    @torch.no_grad()
    def run(
        self,
        source: ActivationSource,
        saes: Mapping[str, SAE],
        sequences: Tensor,
        skip: int,
        batch_size: int,
        features: Sequence[int] | None,
        progress: bool,
    ) -> dict[str, FeatureContexts]:
        check_fit(saes, source)
        per = sequences.shape[1] - skip
        found = {}
        for name, sae in saes.items():
            chosen = torch.arange(sae.config.d_sae) if features is None else torch.tensor(list(features))
            found[name] = _Found(self, sae, chosen, per)
        with ExitStack() as stack:
            stack.enter_context(evaluating(*saes.values()))
            bar = stack.enter_context(tqdm(total=source.num_tokens, desc="contexts", unit="tok", disable=not progress))
            for start, block in _whole_sequences(source, per * batch_size, list(saes)):
                for name, part in found.items():
                    part.add(block[name], start)
                bar.update(len(next(iter(block.values()))))
        return {name: part.result(name, source.num_tokens, sequences, skip) for name, part in found.items()}


class _Found:
    """What was found of one autoencoder so far."""

    def __init__(self, search: _Search, sae: SAE, features: Tensor, per_sequence: int) -> None:
        self.search, self.sae, self.features, self.per = search, sae, features, per_sequence
        self.slots = torch.full((sae.config.d_sae,), NONE)
        self.slots[features] = torch.arange(len(features))
        self.active = torch.zeros(sae.config.d_sae, dtype=torch.int64)
        width = search.before + 1 + search.after
        self.top = _Best(len(features), search.n, width)
        self.sampled = _Best(len(features), search.n, width)

    def add(self, x: Tensor, start: int) -> None:
        """Takes in the activations of whole sequences that begin at token `start`."""
        latents = self.sae.encode_sparse(x.to(self.sae.W_dec.device))
        positive = latents.values > 0
        pattern = latents.pattern.select(positive)
        self.active += torch.bincount(pattern.indices, minlength=len(self.active)).cpu()
        tokens, slots = pattern.rows.cpu(), self.slots[pattern.indices.cpu()]
        values = latents.values[positive].float().cpu()
        wanted = slots != NONE
        pairs = _Pairs(tokens[wanted], slots[wanted], values[wanted], len(self.features), self.per)
        random = _random(
            (tokens[wanted] + start) * self.sae.config.d_sae + pattern.indices.cpu()[wanted], self.search.seed
        )
        for best, scores in ((self.top, pairs.values.double()), (self.sampled, random)):
            best.add(pairs, scores, start, self.search.before, self.search.distinct)

    def result(self, hookpoint: str, num_tokens: int, sequences: Tensor, skip: int) -> FeatureContexts:
        return FeatureContexts(
            hookpoint=hookpoint,
            num_tokens=num_tokens,
            features=self.features.numpy(),
            top=self.top.result(sequences, skip, self.search.before),
            sampled=self.sampled.result(sequences, skip, self.search.before),
            density=self.active.double().numpy() / num_tokens,
        )


class _Pairs:
    """Active (token, feature) pairs of a block of whole sequences, all `[M]`."""

    def __init__(self, tokens: Tensor, slots: Tensor, values: Tensor, num_slots: int, per_sequence: int) -> None:
        self.tokens, self.slots, self.values = tokens, slots, values
        self.num_slots, self.per = num_slots, per_sequence
        self.keys, self.order = torch.sort(tokens * num_slots + slots)

    def windows(self, tokens: Tensor, slots: Tensor, before: int, width: int) -> Tensor:
        """`[Q, W]`: the activations of features around tokens `[Q]`, 0 outside of their sequences."""
        around = tokens[:, None] + torch.arange(width) - before
        inside = around.div(self.per, rounding_mode="floor") == (tokens // self.per)[:, None]
        keys = around * self.num_slots + slots[:, None]
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(inside & (self.keys[places] == keys), self.values[self.order[places]], 0.0)


class _Best:
    """The n best-scored examples of each feature, all `[F, n]`; windows `[F, n, W]`."""

    def __init__(self, num_slots: int, n: int, width: int) -> None:
        self.scores = torch.full((num_slots, n), -torch.inf, dtype=torch.float64)
        self.values = torch.zeros(num_slots, n)
        self.tokens = torch.full((num_slots, n), NONE)
        self.windows = torch.zeros(num_slots, n, width)

    def add(self, pairs: _Pairs, scores: Tensor, start: int, before: int, distinct: bool) -> None:
        """Takes in a block's pairs; equal scores leave earlier tokens first."""
        chosen, ranks = self._candidates(pairs, scores, distinct)
        if not len(chosen):
            return
        n, width = self.windows.shape[1:]
        touched, rows = pairs.slots[chosen].unique(return_inverse=True)
        numbers = torch.full((len(touched), n), NONE)  # places in `pairs`
        numbers[rows, ranks] = chosen
        new = numbers != NONE
        fresh = torch.where(new, scores[numbers], -torch.inf)
        order = torch.cat([self.scores[touched], fresh], 1).argsort(dim=1, descending=True, stable=True)[:, :n]

        def merge(old: Tensor, others: Tensor) -> Tensor:
            return torch.cat([old[touched], others], 1).gather(1, order)

        sources = merge(torch.full_like(self.tokens, NONE), numbers)
        self.scores[touched] = merge(self.scores, fresh)
        self.values[touched] = merge(self.values, torch.where(new, pairs.values[numbers], 0.0))
        self.tokens[touched] = merge(self.tokens, torch.where(new, pairs.tokens[numbers] + start, NONE))
        windows = self.windows[touched].gather(1, order.clamp(max=n - 1)[..., None].expand(-1, -1, width))
        entered = sources != NONE
        pair = sources[entered]
        windows[entered] = pairs.windows(pairs.tokens[pair], pairs.slots[pair], before, width)
        self.windows[touched] = windows

    def _candidates(self, pairs: _Pairs, scores: Tensor, distinct: bool) -> tuple[Tensor, Tensor]:
        """The pairs, n of a feature at most, that may enter, and their ranks among those of their feature."""
        n = self.scores.shape[1]
        left = (scores > self.scores[pairs.slots, -1]).nonzero().squeeze(1)
        left = left[scores[left].argsort(descending=True, stable=True)]
        if distinct:
            sequences = pairs.tokens[left] // pairs.per
            groups = pairs.slots[left] * (int(sequences.max()) + 1 if len(left) else 1) + sequences
            left = left[_firsts(groups)]
        left = left[pairs.slots[left].argsort(stable=True)]
        slots = pairs.slots[left]
        ranks = torch.arange(len(left)) - torch.searchsorted(slots, slots)
        return left[ranks < n], ranks[ranks < n]

    def result(self, sequences: Tensor, skip: int, before: int) -> Contexts:
        per = sequences.shape[1] - skip
        exists = self.tokens != NONE
        places = torch.where(exists, self.tokens % per + skip, NONE)
        numbers = torch.where(exists, self.tokens // per, NONE)
        around = places[..., None] + torch.arange(self.windows.shape[2]) - before
        inside = exists[..., None] & (around >= 0) & (around < sequences.shape[1])
        around = torch.where(inside, around, 0)
        ids = torch.where(inside, sequences.cpu().long()[numbers.clamp(min=0)[..., None], around], NONE)
        return Contexts(
            self.values.numpy(), numbers.numpy(), places.numpy(), ids.numpy(), self.windows.numpy(), before
        )


def _firsts(groups: Tensor) -> Tensor:
    """Where each group comes first, in the order of coming."""
    ordered, places = groups.sort(stable=True)
    first = torch.ones(len(ordered), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return places[first].sort().values


def _random(keys: Tensor, seed: int) -> Tensor:
    """Numbers from 0 to 1 that depend on nothing but key and seed, however keys come in blocks."""
    mixed = keys + torch.tensor(seed + 1) * MIXERS[1]  # int64 wraps around
    for mixer in MIXERS:
        mixed = (mixed ^ (mixed >> 31)) * mixer
    mixed = mixed ^ (mixed >> 29)
    return (mixed & (2**52 - 1)).double() / 2**52


def _whole_sequences(
    source: ActivationSource, block: int, hookpoints: list[str]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The activations in blocks of as many tokens, whole sequences, with the first token of each."""
    for start in range(0, source.num_tokens, block):
        pieces = list(source.chunks(start, min(start + block, source.num_tokens)))
        yield start, {name: torch.cat([piece[name] for piece in pieces]) for name in hookpoints}


def _check(saes: Mapping[str, SAE], n: int, before: int, after: int, features: Sequence[int] | None) -> None:
    check_any(saes)
    for name, number, least in (("n", n, 1), ("before", before, 0), ("after", after, 0)):
        if number < least:
            raise ValueError(f"{name}={number}; need at least {least}. Pass {name}={least} or more.")
    if features is None:
        return
    limit = min(sae.config.d_sae for sae in saes.values())
    if not len(features) or not all(0 <= feature < limit for feature in features):
        raise ValueError(f"features={list(features)[:8]} must be at least 1 number, each below d_sae={limit}.")
    if len(set(features)) < len(features):
        raise ValueError("features holds a number twice. Pass each once.")
