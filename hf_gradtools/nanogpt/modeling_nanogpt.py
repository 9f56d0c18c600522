"""A decoder-only transformer whose parts are chosen by name, with everything that `generate` and `Trainer` want.

Shapes: B batch, S tokens of this forward, K keys with those of the cache, E `n_embd`, W vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .attention import TokenMixer
from .configuration_nanogpt import NanoGPTConfig
from .context import Context, counted_positions, documents_of, explicit_mask, layer_mask, padding_mask
from .output_softmax import OutputSoftmax
from .registry import Component, variant


logger = logging.get_logger(__name__)


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
        if isinstance(module, nn.Linear) and getattr(module, "residual_projection", False):  # see build_linear
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
        body = self.base_model
        before, body.is_open = body.is_open, True  # kept in each forward's context, also for its recomputation
        try:
            yield
        finally:
            body.is_open = before


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
        self.is_recurrent = self._is_stateful = any(not block.attn.uses_keys for block in self.h)
        self.counts_padding = any(block.attn.counts_padding for block in self.h)
        self.rotation = config.rotation_variant
        self.is_open = False  # whether attention computes its weights openly; see second_order
        self.gradient_checkpointing = False
        self.post_init()

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
            use_cache (`bool`, *optional*): whether to make a cache if there is none; default as the configuration
                says, and not while training.

        Raises:
            ValueError: not one of `input_ids` and `inputs_embeds`, positions past the table, a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            logger.warning_once(
                "output_attentions=True needs model.set_attn_implementation('eager'): others give none."
            )
        context = self._context(x, attention_mask, position_ids, past_key_values)
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
        is_token = allowed = documents = None
        if attention_mask is not None and attention_mask.dim() == 4:
            allowed = explicit_mask(attention_mask)
        elif attention_mask is not None:
            is_token = padding_mask(attention_mask, batch, int(past) + tokens, holes=not self.counts_padding)
        if position_ids is not None:
            longest = int(position_ids.max())
            if attention_mask is None and tokens > 1 and past == 0:
                documents = documents_of(position_ids)
        else:
            longest = int(past) + tokens - 1
            position_ids = queries[None] if is_token is None else counted_positions(is_token, tokens)
        self._check_reach(longest, allowed, documents)
        masks = {}
        for window, layer_idx in self.windows.items():
            sizes = (tokens, 0) if cache is None else cache.get_mask_sizes(tokens, layer_idx)
            keys, visible = layer_mask(window, sizes, queries, is_token, documents, int(past) + tokens)
            masks[window] = (keys, visible if allowed is None else allowed)
        implementation = self.config._attn_implementation
        return Context(
            position_ids=position_ids,
            queries=queries,
            token_mask=None if is_token is None else is_token[:, -tokens:],
            rotations=self._rotations(position_ids, x.dtype, longest),
            masks=masks,
            sdpa=None if self.is_open else ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None),
        )

    def _rotations(self, position_ids: Tensor, dtype: torch.dtype, longest: int) -> dict[int, tuple[Tensor, Tensor]]:
        if not self.rotary_dims:
            return {}
        rotary = self.positions[self.rotation]
        return {dim: rotary(position_ids, dim, dtype, longest) for dim in self.rotary_dims}

    def _check_reach(self, longest: int, allowed: Tensor | None, documents: Tensor | None) -> None:
        """ValueError if the positions, or layers with a state, cannot do what is asked."""
        if "abs_pos" in self.positions and longest >= self.block_size:
            raise ValueError(
                f"position {longest} is past block_size={self.block_size}, where the absolute positions end. Shorten "
                "the input, call generate(..., crop_to_block=True), or train with rotary positions alone."
            )
        if self.is_recurrent and (allowed is not None or documents is not None):
            given = "an attention_mask of 4 dimensions" if documents is None else "position_ids that restart"
            raise ValueError(
                f"{given}: this model has layers that carry a state over all tokens of a row. Pass one document a "
                "row, and an attention_mask [batch, tokens] of its padding."
            )


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
        self._is_stateful = self.transformer.is_recurrent  # what generate asks before it goes back some tokens
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
                counts the last position too. `Trainer` counts -100 as a token there when it accumulates gradients.
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
            return_dict=True,
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
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        crop_to_block: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers does; with `crop_to_block` only the last `block_size` tokens are read, anew each time."""
        if crop_to_block:
            input_ids = input_ids[:, -self.config.block_size :]
            attention_mask = None if attention_mask is None else attention_mask[:, -self.config.block_size :]
            kwargs.pop("position_ids", None)  # counted from the first token that is left
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`, with probabilities by `softmax_variant_output`.

        Args:
            crop_to_block (`bool`, defaults to `False`): go on past `block_size` by reading the last `block_size`
                tokens anew at each step, without a cache, as nanoGPT does. Absolute positions have no other way.

        Raises:
            ValueError: beams are asked of a `softmax_variant_output` other than softmax.
        """
        if kwargs.get("crop_to_block"):
            kwargs["use_cache"] = False
        if (name := self.config.softmax_variant_output) != "softmax":
            beams = kwargs.get("num_beams") or getattr(generation_config or self.generation_config, "num_beams", None)
            if (beams or 1) > 1:
                raise ValueError(
                    f"num_beams={beams} adds log-probabilities of softmax, and softmax_variant_output={name!r}. "
                    "Sample, or set model.config.softmax_variant_output='softmax'."
                )
            own = OutputSoftmax(self.config).to(self.device)
            logits_processor = LogitsProcessorList([own, *(logits_processor or [])])
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

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
