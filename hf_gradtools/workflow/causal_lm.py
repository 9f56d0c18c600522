"""A causal LM ready to be trained: tokenizer, weights, adapters, and the collator of its batches."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


__all__ = ["add_lora", "load_model", "load_tokenizer", "make_collator"]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one that cannot pad yet does so with the end-of-text token.

    Raises:
        ValueError: it cannot be loaded, or has neither of these tokens.
    """
    tokenizer = _load(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of model={model!r} has neither a pad nor an eos token; set one in it.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str, dtype: str = "auto") -> PreTrainedModel:
    """A causal LM with weights of type `dtype` ("auto": as they are stored); ValueError if it cannot be loaded."""
    return _load(AutoModelForCausalLM, model, dtype=dtype)


def _load(auto_class: Any, model: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"model={model!r} cannot be loaded: {reason}. Pass Hub id or folder of a causal LM and its tokenizer."
        ) from error


def add_lora(model: PreTrainedModel, rank: int = 16) -> PeftModel:
    """Freezes the model and adds trainable LoRA adapters to all its linear layers but the head."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def make_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads `input_ids` by the tokenizer and `labels` with −100 to the longest row of a batch."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
