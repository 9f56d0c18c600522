"""How a model writes: from contexts to memories, by the pure functions of [`inner_loop`].

Legend: B contexts, S context tokens, M memory vectors, P = M and the control vectors around them, E hidden size,
K inner steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .contexts import check_ids, packed_right
from .inner_loop import Fast, InnerOptimizer, write
from .losses import IGNORE_INDEX, InnerPass, linear_cross_entropy
from .memory import GradMemory
from .phases import (
    ONE_THREAD,
    check_whole,
    frozen,
    set_for_now,
    twice_differentiable,
    with_write_lora,
    without_checkpointing,
)


class WritingMixin:
    """The WRITE half of [`GradMemGPTForCausalLM`], which has the parameters."""

    @property
    def n_prefix(self) -> int:
        """Positions before the first token of a context or query."""
        return self.config.n_mem_tokens + 2 * self.config.n_ctrl_tokens

    def write(
        self,
        context_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: GradMemory | Tensor | None = None,
        K: int | None = None,
    ) -> GradMemory:
        """Reads contexts into memories. Works under `no_grad` and in `eval()`, and gives no parameter a gradient.

        Several threads can write and read at a time, but not while one trains.

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
        memory = GradMemory(memory) if isinstance(memory, Tensor) else memory
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
        with ONE_THREAD, set_for_now(with_write_lora(self.backbone)):
            return self._context_losses(fast, InnerPass(), ids, labels)

    @torch.compiler.disable  # it would leave out the gradients of gradients; the backbone itself can be compiled
    def _write(
        self,
        context_ids: Tensor,
        attention_mask: Tensor | None,
        memory: GradMemory | Tensor | None,
        K: int | None,
    ) -> tuple[Fast, Tensor]:
        """What [`inner_loop.write`] makes of a batch of contexts."""
        check_ids("context_ids", context_ids, attention_mask)
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
        held = list(self.parameters())

        def losses(fast: Fast, inner: InnerPass) -> Tensor:
            if any(now is not then for now, then in zip(self.parameters(), held, strict=True)):
                raise ValueError(
                    "the parameters were exchanged between forward and backward, as torch.func.functional_call does, "
                    "and recompute_write=True needs them again. Set config.recompute_write=False."
                )
            with ONE_THREAD, set_for_now(settings if inner.trained else [*settings, *freezing]):
                return self._context_losses(fast, inner, ids, labels)

        with ONE_THREAD:  # once for all steps: these walk through all modules
            trained = [parameter for parameter in held if parameter.requires_grad]
            settings = [*with_write_lora(self.backbone), *without_checkpointing(self.backbone)]
            settings += twice_differentiable(self.backbone) if is_second else []
            freezing = frozen(self)
        return write(
            fast,
            losses,
            self._optimizer(),
            steps,
            grad_mode=config.grad_mode,
            last_k_second_order=config.last_k_second_order,
            recompute=config.recompute_write,
            keep_last_loss=config.add_inner_loss_to_outer,
            parameters=trained,
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
            token_losses = _open_losses(logits, labels)
        return token_losses.sum(1) / (labels != IGNORE_INDEX).sum(1)

    def _head_losses(
        self, head: nn.Module, inputs: Tensor, predicting: slice, labels: Tensor, inner: InnerPass
    ) -> Tensor:
        hidden = self.backbone.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, predicting]
        if type(head) is not nn.Linear:  # an adapter's layer: what it gives, its weight does not tell
            return _open_losses(head(hidden), labels)
        losses = linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels.flatten(), head.bias, inner)
        return losses.view(labels.shape)

    def _plain_head(self, inputs: Tensor) -> bool:
        """Whether the backbone's logits are a linear layer of its last hidden states, with nothing in between.

        Some models scale or cap them. Found out once, by looking at one token on its way.
        """
        head = self.get_output_embeddings()
        if type(head) is not nn.Linear:  # an adapter's, or quantised
            return False
        if self._probed_head is None or self._probed_head[0] is not head:
            self._probed_head = (head, self._probe(head, inputs[:1, :1].detach().clone()))
        return self._probed_head[1]

    def _probe(self, head: nn.Linear, inputs: Tensor) -> bool:
        seen: dict[str, Tensor] = {}
        accelerators = [inputs.device] if inputs.device.type != "cpu" else []
        kind = inputs.device.type if accelerators else "cuda"
        handles = [
            self.backbone.base_model.register_forward_hook(lambda _, __, out: seen.update(hidden=out[0])),
            head.register_forward_hook(lambda _, args, out: seen.update(given=args[0], logits=out)),
        ]
        try:
            with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=kind):  # as if it had not been
                logits = self.backbone(inputs_embeds=inputs, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return (
            set(seen) == {"hidden", "given", "logits"}
            and torch.equal(seen["given"], seen["hidden"])
            and torch.equal(seen["logits"], logits)
        )

    def _fast(self, memory: GradMemory | Tensor | None, rows: int | None = None) -> Fast:
        """The tensors that steps change, at least float32: steps are smaller than half types resolve."""
        if memory is None:
            fast: Sequence[Tensor] = [self.mem[None]]
            if self.config.mem_proj_mode == "per_sample":
                if type(self.mem_proj) is not nn.Linear:
                    raise ValueError(
                        "mem_proj has an adapter; mem_proj_mode='per_sample' steps plain weights. Exclude it."
                    )
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
            return self.mem_proj(fast[0].to(self.mem_proj.weight.dtype))
        mem, weight, bias = fast
        return torch.baddbmm(bias[:, None], mem, weight.mT)

    def _prefix(self, seen: Tensor, phase: str, embeddings: Tensor) -> list[Tensor]:
        """The memory between its control vectors, of the type and on the device of the embeddings."""
        parts = [seen]
        if self.config.n_ctrl_tokens:
            start, end = getattr(self, f"{phase}_st"), getattr(self, f"{phase}_end")
            parts = [start.expand(len(seen), -1, -1), seen, end.expand(len(seen), -1, -1)]
        return [part.to(embeddings.device, embeddings.dtype) for part in parts]

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


def _open_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses `[B, S]` of logits as they are."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORE_INDEX, reduction="none")
