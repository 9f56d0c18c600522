"""A causal LM with a small memory that is written by gradient steps and read by attention (arXiv 2603.13875).

Legend: B contexts, N = B·n queries, S context tokens, Q query tokens, M memory vectors, P = M and the control vectors
around them, E hidden size, V vocabulary, K inner steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_gradmem import GradMemConfig
from .contexts import check_ids, packed_right, query_positions
from .inner_loop import Fast, InnerOptimizer, write
from .losses import IGNORE_INDEX, InnerPass, causal_lm_loss, linear_cross_entropy
from .memory import GradMemory
from .phases import (
    add_adapter,
    add_write_lora,
    check_whole,
    frozen,
    set_for_now,
    twice_differentiable,
    with_write_lora,
    without_checkpointing,
)


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


class GradMemGPTForCausalLM(GradMemPreTrainedModel, GenerationMixin):
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
        super().__init__(config)
        if backbone is None:
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
        width = config.hidden_size
        self.mem = nn.Parameter(torch.empty(config.n_mem_tokens, width))
        if config.n_ctrl_tokens:
            for name in ("write_st", "write_end", "read_st", "read_end"):
                setattr(self, name, nn.Parameter(torch.empty(config.n_ctrl_tokens, width)))
        if config.use_mem_proj:
            self.mem_proj = nn.Linear(width, width)
        if config.use_write_head:
            self.write_head = nn.Linear(width, config.vocab_size, bias=False)
        if config.learn_inner_lr:
            self.inner_lr = nn.Parameter(torch.empty(()))
        self._has_plain_head: bool | None = None  # not known before the first write
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

    @property
    def n_prefix(self) -> int:
        """Positions before the first token of a context or query."""
        return self.config.n_mem_tokens + 2 * self.config.n_ctrl_tokens

    # ------------------------------------------------------------------------------------------------------- WRITE

    def write(
        self,
        context_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: GradMemory | None = None,
        K: int | None = None,
    ) -> GradMemory:
        """Reads contexts into memories. Works under `no_grad` and in `eval()`, and gives no parameter a gradient.

        Args:
            context_ids (`Tensor`): `[B, S]`.
            attention_mask (`Tensor`, *optional*): `[B, S]`, 0 at padding, on either side.
            memory (`GradMemory`, *optional*): what to go on from; one for each context, or one for all. Default the
                memory that the model learned to start from.
            K (`int`, *optional*): steps, default the configuration's.

        Returns:
            [`GradMemory`] of B samples, detached.

        Raises:
            ValueError: K < 0, a context without tokens or longer than the positions reach, a memory that does not fit.
        """
        with torch.no_grad():
            fast, losses = self._write(context_ids, attention_mask, memory, K)
        rate = float(torch.as_tensor(self._optimizer().learning_rate).detach())
        if attention_mask is None:
            tokens = [context_ids.shape[1]] * len(context_ids)
        else:
            tokens = attention_mask.ne(0).sum(1).tolist()
        before = memory.provenance if memory is not None else [{"model": self.name_or_path or None, "writes": []}]
        before = before * len(context_ids) if len(before) == 1 else before
        provenance = [
            {**entry, "writes": [*entry["writes"], {"K": len(row), "lr": rate, "tokens": count, "inner_losses": row}]}
            for entry, count, row in zip(before, tokens, losses.tolist(), strict=True)
        ]
        return GradMemory(*fast, provenance=provenance)

    def inner_loss(
        self, context_ids: Tensor, attention_mask: Tensor | None = None, memory: GradMemory | None = None
    ) -> Tensor:
        """Each context's loss per token `[B]` given a memory, by default the one the model starts from.

        What a write lowers; no step is taken. The arguments are those of [`write`](GradMemGPTForCausalLM.write).
        """
        ids, labels, fast = self._context(context_ids, attention_mask, memory)
        with set_for_now(with_write_lora(self.backbone)):
            return self._context_losses(fast, InnerPass(), ids, labels)

    def _write(
        self,
        context_ids: Tensor,
        attention_mask: Tensor | None,
        memory: GradMemory | Tensor | None,
        K: int | None,
    ) -> tuple[Fast, Tensor]:
        """What [`inner_loop.write`] makes of a batch of contexts."""
        is_differentiable = torch.is_grad_enabled()
        if is_differentiable:
            check_whole(self)
        # Inference mode allows no gradient at all, and its tensors allow none later
        with torch.inference_mode(False), torch.set_grad_enabled(is_differentiable):
            ids, mask = (x.clone() if x is not None and x.is_inference() else x for x in (context_ids, attention_mask))
            return self._take_steps(ids, mask, memory, K)

    def _take_steps(
        self, context_ids: Tensor, attention_mask: Tensor | None, memory: GradMemory | Tensor | None, K: int | None
    ) -> tuple[Fast, Tensor]:
        config = self.config
        steps = config.K if K is None else K
        if steps < 0:
            raise ValueError(f"K={steps} must be at least 0: it is the number of gradient steps.")
        ids, labels, fast = self._context(context_ids, attention_mask, memory)
        is_second = torch.is_grad_enabled() and config.grad_mode == "second"

        def losses(fast: Fast, inner: InnerPass) -> Tensor:
            settings = [*with_write_lora(self.backbone), *without_checkpointing(self.backbone)]
            settings += twice_differentiable(self.backbone) if is_second else []
            settings += [] if inner.trained else frozen(self)
            with set_for_now(settings):
                return self._context_losses(fast, inner, ids, labels)

        return write(
            fast,
            losses,
            self._optimizer(),
            steps,
            grad_mode=config.grad_mode,
            last_k_second_order=config.last_k_second_order,
            recompute=config.recompute_write,
            keep_last_loss=config.add_inner_loss_to_outer,
            parameters=[parameter for parameter in self.parameters() if parameter.requires_grad],
        )

    def _optimizer(self) -> InnerOptimizer:
        config = self.config
        rate = self.inner_lr if config.learn_inner_lr else config.inner_lr
        return InnerOptimizer(rate, config.use_adam, config.inner_clip_value, config.inner_clip_norm)

    def _context(
        self, context_ids: Tensor, attention_mask: Tensor | None, memory: GradMemory | Tensor | None
    ) -> tuple[Tensor, Tensor, Fast]:
        """Contexts with their padding on the right, their labels, and the memories to start from."""
        check_ids("context_ids", context_ids, attention_mask)
        ids, labels = packed_right(context_ids, attention_mask)
        self._check_reach("context_ids", ids.shape[1], "write it in parts, memory = model.write(part, memory=memory)")
        return ids, labels, self._fast(memory, len(ids))

    def _context_losses(self, fast: Fast, inner: InnerPass, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of each context's tokens `[B]`; the vector before the first token predicts that."""
        embeddings = self.get_input_embeddings()(ids)
        inputs = torch.cat([*self._prefix(self._seen(fast), "write", embeddings), embeddings], 1)
        predicting = slice(self.n_prefix - 1, -1)
        if self.config.use_write_head:
            token_losses = self._head_losses(self.write_head, inputs, predicting, labels, inner)
        elif self._plain_head(inputs):
            token_losses = self._head_losses(self.get_output_embeddings(), inputs, predicting, labels, inner)
        else:
            logits = self.backbone(inputs_embeds=inputs, use_cache=False).logits[:, predicting]
            token_losses = nn.functional.cross_entropy(
                logits.float().mT if logits.dtype != torch.float64 else logits.mT,
                labels,
                ignore_index=IGNORE_INDEX,
                reduction="none",
            )
        return token_losses.sum(1) / (labels != IGNORE_INDEX).sum(1)

    def _head_losses(
        self, head: nn.Linear, inputs: Tensor, predicting: slice, labels: Tensor, inner: InnerPass
    ) -> Tensor:
        hidden = self.backbone.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, predicting]
        losses = linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels.flatten(), head.bias, inner)
        return losses.view(labels.shape)

    def _plain_head(self, inputs: Tensor) -> bool:
        """Whether the backbone's logits are a linear layer of its last hidden states, with nothing in between.

        Some models scale or cap them. Found out once, by looking at one token on its way.
        """
        if self._has_plain_head is None:
            head, seen = self.get_output_embeddings(), {}
            accelerators = [inputs.device] if inputs.device.type != "cpu" else []
            kind = inputs.device.type if accelerators else "cuda"
            handles = [
                self.backbone.base_model.register_forward_hook(lambda _, __, out: seen.update(hidden=out[0])),
                head.register_forward_hook(lambda _, args, out: seen.update(given=args[0], logits=out)),
            ]
            try:
                with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=kind):  # as if it had not been
                    logits = self.backbone(inputs_embeds=inputs[:1, :1].detach(), use_cache=False).logits
            finally:
                for handle in handles:
                    handle.remove()
            self._has_plain_head = (
                type(head) is nn.Linear
                and set(seen) == {"hidden", "given", "logits"}
                and torch.equal(seen["given"], seen["hidden"])
                and torch.equal(seen["logits"], logits)
            )
        return self._has_plain_head

    # -------------------------------------------------------------------------------------------------------- READ

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
            past_key_values (`Cache`, *optional*): what went before, the memory included.
            logits_to_keep (`int` or `Tensor`, defaults to 0): how many last positions to compute; 0 for all.

        Raises:
            ValueError: no memory or several, rows that do not go together, too long a context or query.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            check_ids("input_ids", input_ids)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        self._check_memory(memory, context_ids, memory_embeds)
        fast = losses = None
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
            use_cache,
            logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = causal_lm_loss(outputs.logits, labels, kwargs.get("num_items_in_batch"))
            if losses is not None and self.config.add_inner_loss_to_outer and losses.shape[1]:
                loss = loss + self._inner_share(losses[:, -1], labels, kwargs.get("num_items_in_batch"))
        return GradMemOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory=fast[0] if fast is not None else None,
            inner_losses=losses.detach() if losses is not None else None,
        )

    def _read(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        memory_embeds: Tensor,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        rows, tokens = inputs.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        read = past - self.n_prefix if past else 0  # the query's tokens in the cache
        self._check_reach("input_ids", read + tokens, "shorten it")
        if position_ids is None:
            position_ids = query_positions(attention_mask, read, tokens, inputs.device)
        position_ids = position_ids + self.n_prefix
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(rows, self.n_prefix), attention_mask], 1)
        if not past:
            if rows % len(memory_embeds):
                raise ValueError(
                    f"{rows} queries do not go with {len(memory_embeds)} memories. Pass as many queries for each."
                )
            memory_embeds = memory_embeds.repeat_interleave(rows // len(memory_embeds), 0)
            inputs = torch.cat([*self._prefix(memory_embeds, "read", inputs), inputs], 1)
            before = torch.arange(self.n_prefix, device=inputs.device).expand(len(position_ids), -1)
            position_ids = torch.cat([before, position_ids], 1)
        kwargs.pop("num_items_in_batch", None)  # the loss's, which is not the backbone's to take
        kept: int | Tensor = tokens if isinstance(logits_to_keep, int) and logits_to_keep == 0 else logits_to_keep
        if isinstance(kept, Tensor) and not past:
            kept = kept + self.n_prefix
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

    # ------------------------------------------------------------------------------------------------------ memory

    def _fast(self, memory: GradMemory | Tensor | None, rows: int | None = None) -> Fast:
        """The tensors that steps change, at least float32: steps are smaller than half types resolve."""
        if memory is None:
            fast: Sequence[Tensor] = [self.mem[None]]
            if self.config.mem_proj_mode == "per_sample":
                fast = [self.mem[None], self.mem_proj.weight[None], self.mem_proj.bias[None]]
        else:
            fast = memory.fast if isinstance(memory, GradMemory) else (memory,)
            self._check_fit(fast, rows)
        fast = [tensor.to(self.mem.device, torch.promote_types(tensor.dtype, torch.float32)) for tensor in fast]
        return tuple(x.expand(rows, *x.shape[1:]) if rows is not None and len(x) == 1 else x for x in fast)

    def _seen(self, fast: Fast) -> Tensor:
        """What the backbone sees of the memories `[B, M, E]`."""
        if self.config.mem_proj_mode == "none":
            return fast[0]
        if self.config.mem_proj_mode == "proj":
            return nn.functional.linear(
                fast[0].to(self.mem_proj.weight.dtype), self.mem_proj.weight, self.mem_proj.bias
            )
        mem, weight, bias = fast
        return torch.baddbmm(bias[:, None], mem, weight.mT)

    def _prefix(self, seen: Tensor, phase: str, embeddings: Tensor) -> list[Tensor]:
        """The memory between its control vectors, of the type and on the device of the embeddings."""
        parts = [seen]
        if self.config.n_ctrl_tokens:
            start, end = getattr(self, f"{phase}_st"), getattr(self, f"{phase}_end")
            parts = [start.expand(len(seen), -1, -1), seen, end.expand(len(seen), -1, -1)]
        return [part.to(embeddings.device, embeddings.dtype) for part in parts]

    def _check_memory(self, memory: object, context_ids: object, memory_embeds: object) -> None:
        given = [value for value in (memory, context_ids, memory_embeds) if value is not None]
        if not given:
            raise ValueError(
                "a query without a memory: pass memory=model.write(context_ids), or context_ids= to write first."
            )
        if len(given) > 1:
            raise ValueError("Pass exactly one of memory, context_ids and memory_embeds.")

    def _check_fit(self, fast: Sequence[Tensor], rows: int | None) -> None:
        expected = [tuple(self.mem.shape)]
        if self.config.mem_proj_mode == "per_sample":
            expected += [tuple(self.mem_proj.weight.shape), tuple(self.mem_proj.bias.shape)]
        given = [tuple(tensor.shape[1:]) for tensor in fast]
        if given != expected:
            raise ValueError(
                f"memory has tensors of {given} for each sample; this model's are of {expected}. Memories can be read "
                "only by the model that wrote them."
            )
        if rows is not None and len(fast[0]) not in (1, rows):
            raise ValueError(f"memory has {len(fast[0])} samples for {rows} contexts. Pass one for each, or one.")

    def _check_reach(self, name: str, tokens: int, remedy: str) -> None:
        reach = self.config.max_position_embeddings
        if reach is not None and tokens + self.n_prefix > reach:
            raise ValueError(
                f"{name} has {tokens} tokens; with the memory's {self.n_prefix} positions that is past the "
                f"{reach} of the backbone. At most {reach - self.n_prefix}: {remedy}."
            )

    # -------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        memory: GradMemory | Tensor | None = None,
        context_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        K: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate` from a memory, which is computed once and cached like any prefix.

        Args:
            inputs (`Tensor`): `[N, Q]`, queries, padded on the left; also as `input_ids`.
            memory, context_ids, context_attention_mask, K: as for [`forward`](GradMemGPTForCausalLM.forward).
            **kwargs: what `generate` takes, `attention_mask` included.

        Returns:
            what `generate` does: the queries and what follows, `[N, Q + new]`.

        Raises:
            ValueError: no memory or several, or rows that do not go together.
        """
        self._check_memory(memory, context_ids, kwargs.get("memory_embeds"))
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
        return super().generate(inputs, **kwargs)

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


__all__ = ["GradMemGPTForCausalLM", "GradMemOutput", "GradMemPreTrainedModel"]
