"""A causal LM with a small memory that is written by gradient steps and read by attention (arXiv 2603.13875).

Legend: B contexts, N = B·n queries, S context tokens, Q query tokens, M memory vectors, P = M and the control vectors
around them, E hidden size, V vocabulary, K inner steps.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_gradmem import GradMemConfig
from .contexts import check_ids, padding_first, query_positions
from .losses import IGNORE_INDEX, causal_lm_loss
from .memory import GradMemory
from .phases import ONE_THREAD, add_adapter, add_write_lora, keep_weights
from .writing import WritingMixin


@dataclass
class GradMemOutput(CausalLMOutputWithPast):
    """What [`GradMemGPTForCausalLM`] gives.

    Args:
        loss (`Tensor`, *optional*): of the queries' labels, and of the write if `add_inner_loss_to_outer`.
        logits (`Tensor`): `[N, Q, V]`, of the query's tokens.
        memory (`Tensor`, *optional*): `[B, M, E]`, what was written, if a context was given.
        inner_losses (`Tensor`, *optional*): `[B, K]`, each sample's inner loss before each step.
        hidden_states, attentions, past_key_values: of the memory's positions and the query's.
    """

    memory: Tensor | None = None
    inner_losses: Tensor | None = None


class GradMemPreTrainedModel(PreTrainedModel):
    """What models with a written memory share."""

    config: GradMemConfig  # transformers takes the class from here: no annotations as strings in this file
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # `generate` must not go back some tokens: what is in the cache before them is no query


class GradMemGPTForCausalLM(WritingMixin, GradMemPreTrainedModel, GenerationMixin):
    """A backbone, the memory it starts from, and what only writing or only reading uses.

    WRITE reads `[write_st] memory [write_end] context` and takes K gradient steps on the context's loss, which change
    the memory alone; READ reads `[read_st] memory [read_end] query`. Both are causal.

    ```python
    memory = model.write(context_ids, attention_mask)      # K gradient steps; the context is not needed any more
    model.generate(query_ids, memory=memory)
    model(context_ids=context_ids, input_ids=queries_and_answers, labels=labels).loss.backward()   # through the write
    ```

    Args:
        config (`GradMemConfig`): the memory and its steps, with the backbone's configuration.
        backbone (`PreTrainedModel`, *optional*): the causal LM itself, to be taken as it is; default a new one.
    """

    def __init__(self, config: GradMemConfig, backbone: PreTrainedModel | None = None):
        config.validate_values()  # what was set since it was made
        super().__init__(config)
        if backbone is None:
            if config.base_config is None:
                raise ValueError(
                    "base_config is None: a model needs its backbone's. Pass base_config=LlamaConfig(...)."
                )
            backbone = AutoModelForCausalLM.from_config(config.base_config)
            if config.backbone_adapter is not None:
                add_adapter(backbone, get_peft_config(dict(config.backbone_adapter)), "default")
        self.backbone = backbone
        config.base_config = backbone.config  # one object: what changes it, such as new tokens, changes both
        config._attn_implementation = backbone.config._attn_implementation
        if config.use_write_lora:
            add_write_lora(
                backbone,
                config.write_lora_r,
                config.write_lora_alpha,
                config.write_lora_dropout,
                config.write_lora_target_modules,
            )
        keep_weights(backbone)
        width = self.get_input_embeddings().weight.shape[1]  # which OPT projects to its hidden size
        self.mem = nn.Parameter(torch.empty(config.n_mem_tokens, width))
        if config.n_ctrl_tokens:
            for name in ("write_st", "write_end", "read_st", "read_end"):
                setattr(self, name, nn.Parameter(torch.empty(config.n_ctrl_tokens, width)))
        if config.use_mem_proj:
            self.mem_proj = nn.Linear(width, width)
        if config.use_write_head:
            width_out = self.get_output_embeddings().weight.shape[1]
            self.write_head = nn.Linear(width_out, config.vocab_size, bias=False)
        if config.learn_inner_lr:
            self.inner_lr = nn.Parameter(torch.empty(()))
        self._probed_head: tuple[nn.Module, bool] | None = None  # not known before the first write
        self.post_init()
        self._freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`; a backbone that is to be frozen is."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def _freeze(self) -> None:
        if self.config.freeze_backbone:
            for name, parameter in self.backbone.named_parameters():
                parameter.requires_grad_("lora_" in name)  # its own adapter's, and those for writing

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            for name, parameter in self.named_parameters(recurse=False):
                if name == "inner_lr":
                    init.constant_(parameter, self.config.inner_lr)
                else:
                    init.normal_(parameter, std=self.config.initializer_range)
        elif module is getattr(self, "mem_proj", None):
            init.copy_(module.weight, torch.eye(len(module.weight)))
            init.zeros_(module.bias)
        elif module is getattr(self, "write_head", None):
            init.copy_(module.weight, self.get_output_embeddings().weight)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`, the output layer for writing included."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.use_write_head:
            self.write_head = self._get_resized_lm_head(self.write_head, self.config.vocab_size)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory: GradMemory | Tensor | None = None,
        context_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        K: int | None = None,
        memory_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> GradMemOutput:
        """Answers queries from a memory, or from contexts that are written first; then gradients go through the write.

        Args:
            input_ids (`Tensor`): `[N, Q]`, queries, with their answers when training; or `inputs_embeds` `[N, Q, E]`.
                N is B, or n times B: rows i·n … i·n + n − 1 are the queries of context or memory i.
            attention_mask (`Tensor`, *optional*): `[N, Q]`, 0 at padding, on either side.
            labels (`Tensor`, *optional*): `[N, Q]`, the input ids; positions predict the next, -100 does not count.
            memory (`GradMemory` or `Tensor`, *optional*): B memories, or `[B, M, E]`.
            context_ids (`Tensor`, *optional*): `[B, S]`, instead of `memory`.
            context_attention_mask (`Tensor`, *optional*): `[B, S]`.
            K (`int`, *optional*): inner steps, default the configuration's.
            memory_embeds (`Tensor`, *optional*): `[N, M, E]`, instead of `memory`: what the backbone sees of it.
            position_ids (`Tensor`, *optional*): `[N, Q]`, of the query's tokens, from 0.
            past_key_values (`Cache`, *optional*): what went before, the memory included: then no other is needed.
            logits_to_keep (`int` or `Tensor`, defaults to 0): how many last positions to compute; 0 for all.

        Raises:
            ValueError: no memory or several, rows that do not go together, too long a context or query.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            check_ids("input_ids", input_ids)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        past = _cached(past_key_values)
        fast = losses = None
        if past:  # the memory is in there
            memory = context_ids = memory_embeds = None
        else:
            self._check_memory(memory, context_ids, memory_embeds, K)
        if context_ids is not None:
            fast, losses = self._write(context_ids, context_attention_mask, None, K)
            memory_embeds = self._seen(fast)
        elif memory is not None:
            memory_embeds = self._seen(self._fast(memory))
        outputs = self._read(
            inputs_embeds,
            attention_mask,
            memory_embeds,
            position_ids,
            past_key_values,
            past,
            use_cache,
            logits_to_keep,
            **kwargs,
        )
        if past_key_values is not None and use_cache is not False and _cached(past_key_values) == past:
            raise ValueError(f"a {type(self.backbone).__name__} keeps no cache of what it read. Pass use_cache=False.")
        loss = None
        if labels is not None:
            loss = causal_lm_loss(outputs.logits, labels, kwargs.get("num_items_in_batch"))
            if losses is not None and self.config.add_inner_loss_to_outer and losses.shape[1]:
                loss = loss + self._inner_share(losses[:, -1], labels, kwargs.get("num_items_in_batch"))
        return GradMemOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            memory=fast[0] if fast is not None else None,
            inner_losses=losses.detach() if losses is not None else None,
        )

    def _read(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        memory_embeds: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        past: int,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        rows, tokens = inputs.shape[:2]
        read = past - self.n_prefix if past else 0  # the query's tokens in the cache
        self._check_reach("input_ids", read + tokens, "shorten it")
        if attention_mask is not None and attention_mask.shape != (rows, read + tokens):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}; for this query it must be "
                f"{(rows, read + tokens)}, 0 at padding."
            )
        if position_ids is None:
            position_ids = query_positions(attention_mask, read, tokens, inputs.device)
        position_ids = position_ids + self.n_prefix
        order = None
        if attention_mask is not None:
            order = padding_first(attention_mask, self.n_prefix)
            attention_mask = torch.cat([attention_mask.new_ones(rows, self.n_prefix), attention_mask], 1)
            attention_mask = attention_mask.gather(1, order)
        if memory_embeds is not None:
            if rows % len(memory_embeds):
                raise ValueError(
                    f"{rows} queries do not go with {len(memory_embeds)} memories. Pass as many queries for each."
                )
            memory_embeds = memory_embeds.repeat_interleave(rows // len(memory_embeds), 0)
            inputs = torch.cat([*self._prefix(memory_embeds, "read", inputs), inputs], 1)
            before = torch.arange(self.n_prefix, device=inputs.device).expand(len(position_ids), -1)
            position_ids = torch.cat([before, position_ids], 1)
            if order is not None and not bool(attention_mask[:, 0].all()):
                inputs = inputs.gather(1, order[:, :, None].expand_as(inputs))
                position_ids = position_ids.expand(rows, -1).gather(1, order)
        kwargs.pop("num_items_in_batch", None)  # the loss's, which is not the backbone's to take
        kept: int | Tensor = tokens if isinstance(logits_to_keep, int) and logits_to_keep == 0 else logits_to_keep
        if isinstance(kept, Tensor) and not past:
            kept = kept + self.n_prefix
        # A write in another thread would take away adapters, and gradients
        with ONE_THREAD if self.config.use_write_lora or torch.is_grad_enabled() else nullcontext():
            return self.backbone(
                inputs_embeds=inputs,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=False if use_cache is None and self.training else use_cache,
                logits_to_keep=kept,
                **kwargs,
            )

    def _inner_share(self, losses: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The inner loss's part of the loss; in a batch of several, by this one's share of the labels."""
        share = self.config.inner_loss_weight * losses.mean()
        if num_items_in_batch is None:
            return share
        counted = (labels[:, 1:] != IGNORE_INDEX).sum()
        return share * counted / torch.as_tensor(num_items_in_batch, device=counted.device)

    def _check_memory(self, memory: object, context_ids: object, memory_embeds: object, K: int | None) -> None:
        given = [value for value in (memory, context_ids, memory_embeds) if value is not None]
        if not given:
            raise ValueError(
                "a query without a memory: pass memory=model.write(context_ids), or context_ids= to write first."
            )
        if len(given) > 1:
            raise ValueError("Pass exactly one of memory, context_ids and memory_embeds.")
        if K is not None and context_ids is None:
            raise ValueError(f"K={K} is for writing, and a written memory is given. Leave it out.")

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        memory: GradMemory | Tensor | None = None,
        context_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        K: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate` from a memory, which is computed once and cached like any prefix.

        Args:
            inputs (`Tensor`): `[N, Q]`, queries, padded on the left; also as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): how to generate.
            memory, context_ids, context_attention_mask, K: as for [`forward`](GradMemGPTForCausalLM.forward).
            **kwargs: what `generate` takes, `attention_mask` included.

        Returns:
            what `generate` does: the queries and what follows, `[N, Q + new]`.

        Raises:
            ValueError: no memory or several, or rows that do not go together.
        """
        self._check_memory(memory, context_ids, kwargs.get("memory_embeds"), K)
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values= is not taken: the memory comes first in the cache. Pass the whole query."
            )
        queries = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if queries is None:
            raise ValueError("generate needs queries: pass input_ids=.")
        if context_ids is not None:
            memory = self.write(context_ids, context_attention_mask, K=K)
        if memory is not None:
            seen = self._seen(self._fast(memory))
            if len(queries) % len(seen):
                raise ValueError(f"{len(queries)} queries do not go with {len(seen)} memories; pass as many for each.")
            kwargs["memory_embeds"] = seen.repeat_interleave(len(queries) // len(seen), 0)
        return super().generate(inputs, generation_config, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Caches of fixed length hold the memory too."""
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + self.n_prefix
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The mask of padding as it is: the backbone makes its own of it, with the memory before it."""
        return attention_mask


def _cached(cache: Cache | None) -> int:
    """Positions in a cache."""
    return int(cache.get_seq_length()) if cache is not None else 0


__all__ = ["GradMemGPTForCausalLM", "GradMemOutput", "GradMemPreTrainedModel"]
