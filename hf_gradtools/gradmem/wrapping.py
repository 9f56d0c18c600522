"""A pretrained causal LM with a memory around it."""

from __future__ import annotations

import copy
import os

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_gradtools.gradmem.configuration_gradmem import GradMemConfig
from hf_gradtools.gradmem.modeling_gradmem import GradMemGPTForCausalLM


def get_gradmem_model(
    model: PreTrainedModel | PeftModel | str | os.PathLike[str], config: GradMemConfig, **kwargs: object
) -> GradMemGPTForCausalLM:
    """Puts a writable memory before a causal LM, as `peft.get_peft_model` puts adapters into one.

    ```python
    model = get_gradmem_model("HuggingFaceTB/SmolLM2-135M", GradMemConfig(n_mem_tokens=16, K=2, freeze_backbone=True))
    with_lora = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    model = get_gradmem_model(with_lora, GradMemConfig(n_mem_tokens=16))  # the adapter trains, and the memory
    ```

    Args:
        model: the causal LM itself, which is taken as it is and not copied; or its Hub id or folder. A `PeftModel`
            of one LoRA adapter keeps it, for reading and writing; of the backbone it alone trains.
        config: the memory's configuration, without `base_config`.
        **kwargs: what `AutoModelForCausalLM.from_pretrained` takes, if `model` is a name.

    Raises:
        ValueError: it is no causal LM, `base_config` contradicts it, or its adapter is not LoRA's.
    """
    if isinstance(model, str | os.PathLike):
        model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    if not isinstance(config, GradMemConfig):
        raise ValueError(f"config is a {type(config).__name__}; pass GradMemConfig(n_mem_tokens=8).")
    config = copy.deepcopy(config)
    if isinstance(model, PeftModel):
        config.backbone_adapter, config.freeze_backbone = _adapter(model), True
        model = model.get_base_model()
    _check(model, config)
    if config.base_config is not None and config.base_config.to_dict() != model.config.to_dict():
        raise ValueError("config.base_config is not the model's. Leave it out: it is taken from the model.")
    values = {key: value for key, value in config.to_dict().items() if key != "base_config"}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
        values.pop(name, None)  # the model's
    config = GradMemConfig(base_config=model.config, **values)
    wrapped = GradMemGPTForCausalLM(config, backbone=model)
    wrapped.name_or_path = wrapped.config._name_or_path = model.name_or_path
    wrapped.generation_config = copy.deepcopy(model.generation_config)
    wrapped.train(model.training)
    return wrapped.to(dtype=model.dtype, device=model.device) if not getattr(model, "is_quantized", False) else wrapped


def _check(model: object, config: GradMemConfig) -> None:
    """ValueError if the model cannot be a backbone."""
    is_causal = isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder
    if not is_causal or isinstance(model, GradMemGPTForCausalLM):
        raise ValueError(f"model is a {type(model).__name__}; pass a causal LM of transformers, its Hub id or folder.")
    adapters = config.use_write_lora or config.backbone_adapter is not None
    if adapters and getattr(model, "is_quantized", False):
        raise ValueError(
            "the model is quantised, and with adapters in it could not be loaded again. Load it unquantised, or leave "
            "out use_write_lora and the adapter."
        )


def _adapter(model: PeftModel) -> dict[str, object]:
    if len(model.peft_config) != 1 or "default" not in model.peft_config:
        raise ValueError(f"the model has adapters {sorted(model.peft_config)}; GradMem takes one, named 'default'.")
    adapter = model.peft_config["default"]
    if adapter.peft_type != "LORA":
        raise ValueError(f"the model's adapter is of type {adapter.peft_type}; GradMem takes LoRA's.")
    if adapter.modules_to_save or adapter.bias != "none":
        raise ValueError(
            f"the model's adapter has modules_to_save={adapter.modules_to_save} and bias={adapter.bias!r}; GradMem "
            "takes adapters that train LoRA's matrices alone."
        )
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.to_dict().items()}
    values.update(peft_type="LORA", task_type="CAUSAL_LM", inference_mode=False)
    return {
        key: value for key, value in values.items() if key not in ("runtime_config", "loftq_config", "auto_mapping")
    }
