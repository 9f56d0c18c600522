"""The cache of a layer that carries a state instead of keys and values.

transformers' own `LinearAttentionLayer` counts no tokens, and a cache made only of such layers makes `generate` fail;
this one counts, so that positions are right whichever layers a model has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin


RECURRENT = "nanogpt_recurrent"


class RecurrentStateLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """Named states whose size does not grow, and how many tokens have gone into them.

    `DynamicCache(config=...)` and `StaticCache(config=...)` make one for each layer of type "nanogpt_recurrent".
    """

    _layer_type = RECURRENT
    is_sliding = False
    supports_early_init = False

    is_compileable = False  # it counts in Python
    is_croppable = False

    def __init__(self, **kwargs: Any):
        CacheLayerMixin.__init__(self)
        self.states: dict[str, Tensor] = {}
        self.seen_tokens = 0

    def advance(self, tokens: int, **states: Tensor) -> None:
        """Replaces the states by those after `tokens` more tokens."""
        self.states = states
        self.seen_tokens += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a recurrent layer keeps no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a recurrent layer keeps no keys and values: call advance()")

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("a layer of ours is replaced as a whole: call advance()")

    update_recurrent_state = update_conv_state

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Stays: an offloaded cache passes over layers of linear attention, whose states are small."""

    def prefetch(self) -> None:
        """Never went away."""

    def reset(self) -> None:
        self.states, self.seen_tokens, self.is_initialized = {}, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a recurrent layer keeps no earlier state to go back to. Generate without assisted or lookup decoding."
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state[indices])

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = {name: function(state) for name, state in self.states.items()}


# The mixin registers it for dynamic caches only; its states are as large in a static one.
STATIC_LAYER_TYPE_MAPPING[RECURRENT] = RecurrentStateLayer


def recurrent_layer(cache: Cache | None, layer_idx: int) -> RecurrentStateLayer | None:
    """The cache of a layer without keys and values.

    Raises:
        ValueError: the cache was made without the model's configuration.
    """
    if cache is None:
        return None
    # A cache made without a configuration grows its layers by updates of keys, and knows none of this kind.
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    # By its type's name: a model loaded with its own code has a class of its own, and the last one loaded is made.
    if getattr(layer, "_layer_type", None) != RECURRENT:
        raise ValueError(
            f"past_key_values has no state for layer {layer_idx}, which keeps no keys and values. Make the cache as "
            "DynamicCache(config=model.config)."
        )
    return layer
