"""A causal LM ready to be trained: tokenizer, weights, adapters, and the collator of its batches."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_gradtools.core.quantized import keep_quantized_gradients


__all__ = [
    "add_lora",
    "check_bitsandbytes",
    "load_model",
    "load_quantized_model",
    "load_tokenizer",
    "make_collator",
]


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


def check_bitsandbytes() -> None:
    """ImportError if weights cannot be quantised; asked before anything is loaded."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "qlora=True quantises by bitsandbytes, which is not installed: pip install 'hf_gradtools[bnb]'"
        )


def load_quantized_model(
    model: str, dtype: str = "auto", device: torch.device | str = "cpu", gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """A causal LM whose linear layers are NF4, doubly quantised, and compute in bfloat16: QLoRA's, for adapters.

    Args:
        model: Hub id or folder.
        dtype: in which the other weights are loaded; float32 from then on.
        device: where it is quantised, and stays.
        gradient_checkpointing: whether it will train with it.

    Raises:
        ValueError: it cannot be loaded.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded = _load(AutoModelForCausalLM, model, dtype=dtype, quantization_config=quantization, device_map={"": device})
    keep_quantized_gradients(loaded)  # for good: evaluations before and after training must not repack it either
    return prepare_model_for_kbit_training(
        loaded, gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )


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
