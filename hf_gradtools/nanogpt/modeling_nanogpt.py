"""A decoder-only transformer whose parts are chosen by name, with everything that `generate` and `Trainer` want.

Shapes: B batch, S tokens of this forward, K keys with those of the cache, E `n_embd`, W vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Context, TokenMixer
from .caching import visible_keys
from .configuration_nanogpt import NanoGPTConfig
from .linear import Linear
from .output_softmax import OutputSoftmax
from .registry import Component, variant


class NanoGPTBlock(GradientCheckpointingLayer):
    """Attention and MLP around a residual stream, with norms before, on and after what each adds."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        norm = variant("norm", config.of_layer("norm_variant_attn", layer_idx))

        def norm_if(wanted: bool) -> nn.Module | None:
            return norm(config, config.n_embd) if wanted else None

        self.is_parallel = config.use_parallel_mlp
        self.ln_1, self.ln_2 = norm_if(config.use_pre_ln), norm_if(config.use_pre_ln)
        self.attn = variant("attention", config.of_layer("attention_variant", layer_idx))(config, layer_idx)
        self.mlp = variant("mlp", config.of_layer("mlp_variant", layer_idx))(config, layer_idx)
        self.peri_1, self.peri_2 = norm_if(config.use_peri_ln), norm_if(config.use_peri_ln)
        self.post_1 = norm_if(config.use_post_ln and not self.is_parallel)  # parallel parts are added at once
        self.post_2 = norm_if(config.use_post_ln)

    def forward(self, x: Tensor, context: Context, past_key_values: Cache | None = None) -> Tensor:
        mixed, _ = self.attn(_through(self.ln_1, x), context, past_key_values=past_key_values)
        mixed = _through(self.peri_1, mixed)
        if self.is_parallel:
            return _through(self.post_2, x + mixed + _through(self.peri_2, self.mlp(_through(self.ln_2, x))))
        x = _through(self.post_1, x + mixed)
        return _through(self.post_2, x + _through(self.peri_2, self.mlp(_through(self.ln_2, x))))

    def norms(self) -> list[nn.Module]:
        """Those it has."""
        every = (self.ln_1, self.ln_2, self.peri_1, self.peri_2, self.post_1, self.post_2)
        return [norm for norm in every if norm is not None]


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class NanoGPTPreTrainedModel(PreTrainedModel):
    """What both models share: names, initial weights, the switch to second derivatives."""

    config: NanoGPTConfig  # transformers takes the class from here: no annotations as strings in this file
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["NanoGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": NanoGPTBlock, "attentions": TokenMixer}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Linear) and module.residual_projection:
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.n_layer))
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, Component):
            module.init_parameters()

    @property
    def device(self) -> torch.device:
        """Where the model is. `generate` asks at every token, and transformers' own answer walks all parameters."""
        return self.base_model.wte.weight.device

    @contextmanager
    def second_order(self) -> Iterator[None]:
        """Forwards inside the block can be differentiated twice, which fused attention kernels cannot.

        ```python
        with model.second_order():
            loss = model(input_ids, labels=input_ids).loss
        grads = torch.autograd.grad(loss, model.parameters(), create_graph=True)
        ```
        """
        with sdpa_kernel(SDPBackend.MATH):
            yield


class NanoGPTModel(NanoGPTPreTrainedModel):
    """The blocks between the embeddings and the last norm, without the output layer.

    Args:
        config (`NanoGPTConfig`): sizes and variants.
    """

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.ModuleDict(
            {
                name: variant("position", name)(config)
                for name in config.position_variants
                if variant("position", name).place != "scores"  # the layers have those
            }
        )
        self.dropout = config.dropout
        self.h = nn.ModuleList(NanoGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = variant("norm", config.norm_variant_output)(config, config.n_embd)
        self.block_size = config.block_size
        self.rotary_dims = sorted({block.attn.rotary_dim for block in self.h} - {0})
        # Window -> the first layer that has it: layers of one window see the same keys.
        self.windows = {block.attn.window: i for i, block in reversed(list(enumerate(self.h))) if block.attn.uses_keys}
        self.is_recurrent = any(not block.attn.uses_keys for block in self.h)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, S, E]`.

        Args:
            input_ids (`Tensor`): `[B, S]`; or `inputs_embeds` `[B, S, E]`.
            attention_mask (`Tensor`, *optional*): `[B, K]`, 0 at padding on either side, the cache's tokens
                included; or a bool `[B or 1, 1, S, K]`, True where a query may look, for models of keys only.
            position_ids (`Tensor`, *optional*): `[B or 1, S]`; default counts the tokens that are not padding.
            past_key_values (`Cache`, *optional*): what went before; it is extended.
            use_cache (`bool`, *optional*): whether to make a cache if there is none.

        Raises:
            ValueError: not one of `input_ids` and `inputs_embeds`, positions past the table, a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        context = self._context(x, attention_mask, position_ids, past_key_values)
        if "abs_pos" in self.positions:
            self._check_absolute(context.position_ids)
        for position in self.positions.values():
            if position.place == "embedding":
                x = x + position(context.position_ids)
        if self.training and self.dropout:
            x = nn.functional.dropout(x, self.dropout)
        for block in self.h:
            x = block(x, context, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), past_key_values=past_key_values)

    def _context(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Context:
        batch, tokens = x.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        queries = torch.arange(tokens, device=x.device) + past
        mask_4d = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        key_mask = None if mask_4d is not None else self._key_mask(attention_mask, batch, tokens, past)
        if position_ids is None:
            position_ids = queries[None] if key_mask is None else _counted_positions(key_mask, tokens)
        rotations = {}
        if self.rotary_dims:
            rotary, longest = self.positions["rotary"], self._longest(position_ids, past, tokens)
            rotations = {dim: rotary(position_ids, dim, x.dtype, longest) for dim in self.rotary_dims}
        if mask_4d is not None and self.is_recurrent:
            raise ValueError(
                f"attention_mask of shape {tuple(mask_4d.shape)} says which keys each query sees, and this model has "
                "layers without keys. Pass a mask [batch, tokens] of padding."
            )
        token_mask = key_mask[:, -tokens:].bool() if key_mask is not None and self.is_recurrent else None
        masks = {w: self._mask(w, i, queries, key_mask, mask_4d, cache) for w, i in self.windows.items()}
        sdpa = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return Context(position_ids, queries, token_mask, rotations, masks, sdpa)

    @staticmethod
    def _key_mask(attention_mask: Tensor | None, batch: int, tokens: int, past: Any) -> Tensor | None:
        """The mask of padding `[B, past + S]`, or None if nothing is padding."""
        if attention_mask is None or bool(attention_mask.all()):
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] != past + tokens:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; needed is [{batch}, {int(past) + tokens}], "
                "1 for each token of the cache and of the input that is not padding."
            )
        return attention_mask

    @staticmethod
    def _longest(position_ids: Tensor, past: Any, tokens: int) -> int:
        """The largest position, without waiting for the device where its own count bounds it."""
        return int(position_ids.max()) if position_ids.shape[0] > 1 else int(past) + tokens

    def _mask(
        self,
        window: int | None,
        layer_idx: int,
        queries: Tensor,
        key_mask: Tensor | None,
        mask_4d: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = queries.shape[0]
        length, offset = (tokens, 0) if cache is None else cache.layers[layer_idx].get_mask_sizes(tokens)
        keys = torch.arange(length, device=queries.device) + offset
        if mask_4d is not None:
            return keys, mask_4d if mask_4d.dtype == torch.bool else mask_4d == 0
        fits = window is None or length <= window
        if key_mask is None and fits and (length == tokens or (tokens == 1 and not self._is_static(cache))):
            return keys, None
        if key_mask is not None:
            missing = offset + length - key_mask.shape[1]  # places of a static cache that are still empty
            key_mask = nn.functional.pad(key_mask, (0, max(missing, 0)))[:, offset : offset + length]
        return keys, visible_keys(queries, keys, key_mask, window)

    @staticmethod
    def _is_static(cache: Cache | None) -> bool:
        return cache is not None and cache.get_max_length() >= 0

    def _check_absolute(self, position_ids: Tensor) -> None:
        longest = int(position_ids.max())
        if longest >= self.block_size:
            raise ValueError(
                f"position {longest} is past block_size={self.block_size}, where the absolute positions end. Shorten "
                "the input, call generate(..., crop_to_block=True), or train with rotary positions alone."
            )


def _counted_positions(key_mask: Tensor, tokens: int) -> Tensor:
    """Position of each of the last tokens among those of its row that are not padding."""
    return (key_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


class NanoGPTForCausalLM(NanoGPTPreTrainedModel, GenerationMixin):
    """The language model: [`NanoGPTModel`] and an output layer, tied to the embedding by default.

    Args:
        config (`NanoGPTConfig`): sizes and variants.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.transformer = NanoGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.vocab_size, self.softcap = config.vocab_size, config.final_logit_softcapping
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, S, W]`, and the loss if there are labels.

        Args:
            labels (`Tensor`, *optional*): `[B, S]`, the input ids; each position predicts the next label. -100 does
                not count.
            shift_labels (`Tensor`, *optional*): `[B, S]`, what each position itself predicts: nanoGPT's y, which
                counts the last position too.
            logits_to_keep (`int` or `Tensor`, defaults to 0): how many last positions to compute; 0 for all.

            The others are those of [`NanoGPTModel`].
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        loss = None
        if labels is not None or shift_labels is not None:
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels.contiguous()
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The mask of padding as it is: the model makes its own of it for static caches too."""
        return attention_mask

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, crop_to_block: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers does; with `crop_to_block` only the last `block_size` tokens are read, anew each time."""
        if not crop_to_block:
            return super().prepare_inputs_for_generation(input_ids, **kwargs)
        kept = {"input_ids": input_ids[:, -self.config.block_size :], "use_cache": False}
        if (mask := kwargs.get("attention_mask")) is not None:
            kept["attention_mask"] = mask[:, -self.config.block_size :]
        return kept

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, with probabilities by `softmax_variant_output`.

        Args:
            crop_to_block (`bool`, defaults to `False`): go on past `block_size` by reading the last `block_size`
                tokens anew at each step, without a cache, as nanoGPT does. Absolute positions have no other way.
        """
        if kwargs.get("crop_to_block"):
            kwargs["use_cache"] = False
        if self.config.softmax_variant_output != "softmax":
            own = OutputSoftmax(self.config).to(self.device)
            kwargs["logits_processor"] = LogitsProcessorList([own, *(kwargs.get("logits_processor") or [])])
        return super().generate(inputs, *args, **kwargs)

    @classmethod
    def from_gpt2(cls, model: Any, **kwargs: Any) -> "NanoGPTForCausalLM":
        """A GPT-2 of transformers as a nanoGPT, with equal logits; see [`importing.from_gpt2`]."""
        from .importing import from_gpt2

        return from_gpt2(cls, model, **kwargs)

    @classmethod
    def from_nanogpt(cls, path: Any, **kwargs: Any) -> "NanoGPTForCausalLM":
        """The model of a nanoGPT `ckpt.pt`, with equal logits; see [`importing.from_nanogpt`]."""
        from .importing import from_nanogpt

        return from_nanogpt(cls, path, **kwargs)

    def save_nanogpt(self, path: Any) -> None:
        """Writes a `ckpt.pt` that nanoGPT's own model loads; see [`importing.save_nanogpt`]."""
        from .importing import save_nanogpt

        save_nanogpt(self, path)


__all__ = ["NanoGPTForCausalLM", "NanoGPTModel", "NanoGPTPreTrainedModel"]
