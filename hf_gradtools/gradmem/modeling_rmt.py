"""The forward-only baseline: a memory that the model writes as it reads (RMT, arXiv 2207.06881)."""

import torch
from torch import Tensor

from .configuration_rmt import RMTConfig
from .inner_loop import Fast
from .losses import IGNORE_INDEX
from .memory import GradMemory
from .modeling_gradmem import GradMemGPTForCausalLM
from .phases import ONE_THREAD, set_for_now, with_write_lora


class RMTForCausalLM(GradMemGPTForCausalLM):
    """As [`GradMemGPTForCausalLM`], but a write is a forward pass.

    WRITE reads `[write_st] memory [write_end] segment memory`; the last hidden states of the second memory are the
    memory of the next segment. READ is the same. Training goes through all segments.

    Args:
        config (`RMTConfig`): the memory and the segments, with the backbone's configuration.
        backbone (`PreTrainedModel`, *optional*): the causal LM itself; default a new one.
    """

    config: RMTConfig

    def _write(
        self,
        context_ids: Tensor,
        attention_mask: Tensor | None,
        memory: GradMemory | Tensor | None,
        K: int | None,
    ) -> tuple[Fast, Tensor]:
        if K is not None:
            raise ValueError(f"K={K}: a recurrent memory takes no gradient steps. Leave it out.")
        ids, labels, (mem,) = self._context(context_ids, attention_mask, memory)
        length = self.config.segment_length or ids.shape[1]
        with ONE_THREAD, set_for_now(with_write_lora(self.backbone)):
            for segment, is_token in zip(ids.split(length, 1), (labels != IGNORE_INDEX).split(length, 1), strict=True):
                has_tokens = is_token.any(1)[:, None, None]
                mem = torch.where(has_tokens, self._read_segment(mem, segment, is_token), mem)
        return (mem,), mem.new_empty(len(mem), 0)

    def _read_segment(self, mem: Tensor, ids: Tensor, is_token: Tensor) -> Tensor:
        """The memories after one segment `[B, M, E]`."""
        embeddings = self.get_input_embeddings()(ids)
        prefix = self._prefix(mem, "write", embeddings)
        inputs = torch.cat([*prefix, embeddings, mem.to(embeddings.dtype)], 1)
        ones = is_token.new_ones(len(ids), 1)
        mask = torch.cat([ones.expand(-1, self.n_prefix), is_token, ones.expand(-1, mem.shape[1])], 1).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = self.backbone.base_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return outputs.last_hidden_state[:, -mem.shape[1] :].to(mem.dtype)

    def _check_reach(self, name: str, tokens: int, remedy: str) -> None:
        if name == "context_ids":  # read by segments, with the memory once more behind
            tokens = min(tokens, self.config.segment_length or tokens) + self.config.n_mem_tokens
            remedy = "pass a smaller segment_length to RMTConfig"
        super()._check_reach(name, tokens, remedy)


__all__ = ["RMTForCausalLM"]
