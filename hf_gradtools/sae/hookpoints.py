"""Where SAEs read a model: `"layers.5"` is the output of decoder block 5, whatever the model calls its blocks.

Any other dotted path names a module inside the base model, the blocks as `layers` (`"layers.5.mlp"`) or by their own
name (`"h.5.mlp"`). Shapes: B sequences, S positions, D = d_in.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


__all__ = ["base_model", "capture", "d_in", "decoder_blocks", "list_hookpoints", "resolve", "run", "widths"]

BLOCK = re.compile(r"layers\.(\d+)((?:\.\w+)*)")
MAX_NAMED = 8  # hookpoints in an error


class _AllCaptured(Exception):
    """Ends a forward whose remaining layers nobody needs."""


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a causal LM, without its head.

    Raises:
        ValueError: if it is no transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model is a {type(model).__name__}; hookpoints need a transformers PreTrainedModel. "
            "Pass AutoModelForCausalLM.from_pretrained(...), of a PEFT model its get_base_model()."
        )
    decoder: nn.Module = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        decoder = model.base_model
    assert isinstance(decoder, PreTrainedModel)
    return decoder


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a causal LM: the outermost list of as many modules as its config counts hidden layers.

    Raises:
        ValueError: if it has no such list.
    """
    base = base_model(model)
    count = base.config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name.count("."), module) for name, module in lists if len(module) == count]
    if not fitting:
        found = ", ".join(f"{name} ({len(module)})" for name, module in lists) or "none"
        raise ValueError(
            f"missing hidden state: {type(base).__name__} has no list of num_hidden_layers={count} blocks; its module "
            f"lists: {found}. Pass a decoder whose blocks are an nn.ModuleList."
        )
    return min(fitting, key=lambda depth_and_module: depth_and_module[0])[1]


def list_hookpoints(model: PreTrainedModel) -> list[str]:
    """The output of every decoder block: `["layers.0", "layers.1", ...]`."""
    return [f"layers.{i}" for i in range(len(decoder_blocks(model)))]


def resolve(model: PreTrainedModel, hookpoint: str) -> nn.Module:
    """The module whose output a hookpoint names.

    Args:
        model (`PreTrainedModel`): a causal LM or its base model.
        hookpoint (`str`): `"layers.<block>"`, `"layers.<block>.<path>"`, or a dotted path inside the base model.

    Raises:
        ValueError: if the model has no such module.
    """
    blocks = decoder_blocks(model)
    match = BLOCK.fullmatch(hookpoint)
    if match and int(match[1]) < len(blocks):
        root, path = blocks[int(match[1])], match[2][1:]
    else:
        root, path = base_model(model), hookpoint
    try:
        module = root.get_submodule(path)
    except AttributeError:
        module = None
    if module is None or not hookpoint:
        valid = [f"layers.0 ... layers.{len(blocks) - 1}"]
        valid += [f"layers.<i>.{name}" for name, _ in blocks[0].named_modules() if name][:MAX_NAMED]
        raise ValueError(
            f"hookpoint={hookpoint!r} names no module of {type(base_model(model)).__name__}. Valid are "
            f"{', '.join(valid)}, and any other dotted path inside its base model."
        )
    return module


@contextlib.contextmanager
def capture(model: PreTrainedModel, hookpoints: Iterable[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Keeps the outputs of some modules, detached, of the latest forward inside the block.

    Args:
        model (`PreTrainedModel`): a causal LM or its base model.
        hookpoints (`Iterable[str]`): see [`resolve`].
        stop (`bool`, defaults to `False`): end each forward of the base model once all are there, by an exception
            that only [`run`] catches.

    Yields:
        `dict[str, Tensor]`: `[B, S, D]` by hookpoint, filled by each forward; of a module that runs several times in
        one forward the first output.
    """
    modules = {hookpoint: resolve(model, hookpoint) for hookpoint in hookpoints}
    if not modules:
        raise ValueError("hookpoints is empty; at least 1 is needed. Pass hookpoints=['layers.0'].")
    captured: dict[str, Tensor] = {}

    def hook_of(hookpoint: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if hookpoint not in captured:
                captured[hookpoint] = _hidden_state(output, hookpoint).detach()
            if stop and len(captured) == len(modules):
                raise _AllCaptured

        return hook

    with contextlib.ExitStack() as handles:
        start = base_model(model).register_forward_pre_hook(lambda *_: captured.clear())
        handles.callback(start.remove)
        for hookpoint, module in modules.items():
            handles.callback(module.register_forward_hook(hook_of(hookpoint)).remove)
        yield captured


@torch.no_grad()
def run(
    model: PreTrainedModel, hookpoints: Iterable[str], input_ids: Tensor | None = None, **inputs: Any
) -> dict[str, Tensor]:
    """Runs the base model as far as the last of the hookpoints, in the mode (train or eval) that it is in.

    Args:
        model (`PreTrainedModel`): a causal LM or its base model; its head never runs.
        hookpoints (`Iterable[str]`): see [`resolve`].
        input_ids (`Tensor`, *optional*): `[B, S]`.
        **inputs: of the base model: `attention_mask`, `inputs_embeds`, ...

    Returns:
        `dict[str, Tensor]`: `[B, S, D]` by hookpoint, in the order given.

    Raises:
        ValueError: if a module puts out no hidden state, or does not run.
    """
    hookpoints = list(hookpoints)
    with capture(model, hookpoints, stop=True) as captured:
        with contextlib.suppress(_AllCaptured):
            base_model(model)(input_ids=input_ids, **{"use_cache": False, **inputs})
        missing = [hookpoint for hookpoint in hookpoints if hookpoint not in captured]
        if missing:
            raise ValueError(
                f"missing hidden state: hookpoint={missing[0]!r} did not run in the forward of "
                f"{type(base_model(model)).__name__}. "
                f"Pass one of layers.0 ... layers.{len(decoder_blocks(model)) - 1}."
            )
        for hookpoint in hookpoints:
            if input_ids is not None and captured[hookpoint].shape[:2] != input_ids.shape:
                raise _missing(hookpoint, captured[hookpoint])
        return {hookpoint: captured[hookpoint] for hookpoint in hookpoints}


def widths(model: PreTrainedModel, hookpoints: Iterable[str]) -> dict[str, int]:
    """`d_in` of each hookpoint, by a forward of a few tokens."""
    ids = torch.zeros(2, 3, dtype=torch.long, device=model.device)
    return {hookpoint: state.shape[-1] for hookpoint, state in run(model, hookpoints, input_ids=ids).items()}


def d_in(model: PreTrainedModel, hookpoint: str) -> int:
    """Numbers in a hidden state at a hookpoint."""
    return widths(model, [hookpoint])[hookpoint]


def _hidden_state(output: Any, hookpoint: str) -> Tensor:
    state = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(state, Tensor) or state.ndim != 3 or not state.is_floating_point():
        raise _missing(hookpoint, state)
    return state


def _missing(hookpoint: str, state: Any) -> ValueError:
    found = f"{tuple(state.shape)} {state.dtype}" if isinstance(state, Tensor) else type(state).__name__
    return ValueError(
        f"missing hidden state: hookpoint={hookpoint!r} puts out {found}; need floats [batch, positions, d_in]. "
        "Pass a decoder block ('layers.0') or a module in one that returns hidden states."
    )
