"""What the ghost engines ask of a model: its base, what its loss counts, which parameters gradients are taken in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss


def base_model(model: nn.Module) -> nn.Module:
    """The model under PEFT adapters, `torch.compile` and data parallelism."""
    from peft import PeftModel

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_name(model: nn.Module) -> str:
    """Hub id that the model was loaded from, or the last part of a folder's path, else its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return (Path(name).name if os.path.exists(name) else name) or type(model).__name__


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss predicts label t+1 at position t."""
    base = base_model(model)
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        return False
    return base.loss_function is ForCausalLMLoss


def divides_by_items(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model's loss is the sum over targets divided by `num_items_in_batch` when it is told that number.

    Trainer tells every model whose forward takes keyword arguments, and many leave it unused.

    Args:
        model: in eval mode.
        batch: with labels that count.
    """
    try:
        with torch.no_grad():
            losses = [model(**batch, num_items_in_batch=torch.tensor(n))["loss"] for n in (1, 2)]
    except TypeError:  # does not take it
        return False
    # What is not divided, such as the balancing loss of experts, is in both.
    return bool((losses[0] - losses[1]).abs() > 1e-3 * losses[0].abs())


@contextmanager
def differentiated(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Marks the parameters that gradients are taken in as needing them: those that do already, else the adapters of
    a PEFT model, else every floating-point parameter. Afterwards all flags are as before."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        if not any(before.values()):
            _require_grads(model)
        yield [p for p in before if p.requires_grad]
    finally:
        for p, needed in before.items():
            p.requires_grad_(needed)


def _require_grads(model: nn.Module) -> None:
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.set_requires_grad(model.active_adapters)
        return
    for p in model.parameters():
        if p.is_floating_point():
            p.requires_grad_(True)


def load_any_model(model: str | os.PathLike[str], dtype: str = "auto") -> PreTrainedModel | nn.Module:
    """A model with its task head, of the class that its configuration names, or a PEFT adapter on its base.

    Args:
        model: Hub id or folder.
        dtype: of the weights; "auto" as they are stored.

    Raises:
        ValueError: it cannot be loaded, or its configuration names no class of transformers.
    """
    import peft
    import transformers

    name = os.fspath(model)
    try:
        if _has_adapter(name):
            kind = getattr(peft, _peft_class(peft.PeftConfig.from_pretrained(name).task_type))
            return kind.from_pretrained(name, dtype=dtype)
        architectures = AutoConfig.from_pretrained(name).architectures or []
        kind = next((getattr(transformers, a) for a in architectures if hasattr(transformers, a)), None)
        if kind is None:
            raise ValueError(f"its architectures {architectures} are no classes of transformers")
        return kind.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"model={name!r} cannot be loaded: {reason}. Pass Hub id or folder, or the model.") from error


def _has_adapter(name: str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / "adapter_config.json").exists()
    from transformers.utils import cached_file

    found = cached_file(
        name,
        "adapter_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def _peft_class(task: str | None) -> str:
    return {
        "CAUSAL_LM": "AutoPeftModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
        "SEQ_CLS": "AutoPeftModelForSequenceClassification",
        "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    }.get(task or "", "AutoPeftModel")
