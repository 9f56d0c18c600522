"""How weights and activations are distributed: what quantisation and outliers are about.

B rows, S tokens of a row.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_gradtools.nanogpt.analysis.moments import Moments


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["activation_statistics", "block_batches", "weight_statistics"]

logger = logging.get_logger(__name__)


def weight_statistics(model: nn.Module) -> Dataset:
    """Statistics of each parameter, a tied one once.

    Args:
        model (`nn.Module`): any.

    Returns:
        `datasets.Dataset`: `name`, `shape`, `count`, `mean`, `stdev` (population), `kurtosis` (Fisher's), `abs_max`.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.numel()]
    rows = [
        {"name": name, "shape": "x".join(map(str, parameter.shape)), **_row(Moments.of(parameter))}
        for name, parameter in tqdm(parameters, desc="Weights", leave=False)
    ]
    return _dataset(rows)


def activation_statistics(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], modules: Sequence[str] | None = None
) -> Dataset:
    """Statistics of what modules compute on some texts; padding does not count.

    Of an output `[B, S, …]`, or `[B, heads, S, …]`, the tokens count that the mask shows; one for all rows counts for
    each of them. An output of another shape counts as a whole, but is left out where there is padding, with a warning.

    Args:
        model (`PreTrainedModel`): a causal LM; it stays in its mode.
        batches (`Iterable`): of `input_ids` `[B, S]` and, if there is padding, `attention_mask` `[B, S]`.
        modules (`Sequence[str]`, *optional*): names, or patterns such as `"*.mlp"`; default those without children.

    Returns:
        `datasets.Dataset`: `name`, `type`, `count`, `mean`, `stdev`, `kurtosis`, `abs_max`, in the model's order. A
        module called several times in a forward is counted as often.

    Raises:
        ValueError: a pattern names no module, or there is no batch.
    """
    chosen = _choose(model, modules)
    seen = {name: Moments() for name in chosen}
    left_out: set[str] = set()
    mask = torch.empty(0)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            values = _of_tokens(output, mask)
            if values is None:
                left_out.add(name)
            else:
                seen[name].update(values)

        return hook

    was_training = model.training
    handles = [module.register_forward_hook(hook_of(name)) for name, module in chosen.items()]
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="Activations", leave=False):
                ids = batch["input_ids"].to(model.device)
                mask = batch.get("attention_mask", torch.ones_like(ids)).to(model.device).bool()
                model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if mask.ndim != 2:
        raise ValueError("batches has no batch; pass at least one, with input_ids [B, S].")
    if left_out:
        logger.warning(
            f"Not of one vector per token, and left out where rows were padded: {', '.join(sorted(left_out))}."
        )
    return _dataset(
        [
            {"name": name, "type": type(chosen[name]).__name__, **_row(moments)}
            for name, moments in seen.items()
            if moments.count
        ]
    )


def block_batches(ids: Sequence[int], block_size: int, batch_size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Cuts tokens into blocks, and blocks into batches; the last block is padded by id 0 under a mask.

    Args:
        ids (`Sequence[int]`): tokens of a text.
        block_size (`int`): tokens in a block.
        batch_size (`int`, defaults to 8): blocks in a batch.
    """
    for first in range(0, len(ids), block_size * batch_size):
        part = torch.tensor(ids[first : first + block_size * batch_size])
        blocks = part.split(block_size)
        longest = len(blocks[0])
        rows = torch.zeros(len(blocks), longest, dtype=torch.long)
        for row, block in zip(rows, blocks, strict=True):
            row[: len(block)] = block
        lengths = torch.tensor([len(block) for block in blocks])
        yield {"input_ids": rows, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def _choose(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    if patterns is None:
        return {name: module for name, module in model.named_modules() if not next(module.children(), None)}
    named = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            raise ValueError(f"modules: no module is called {pattern!r}. There are {', '.join(list(named)[:8])}, …")
    return {name: module for name, module in named.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def _of_tokens(output: Any, mask: Tensor) -> Tensor | None:
    """The values of an output at real tokens; None if it cannot be told which they are."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return mask.new_zeros(0, dtype=torch.float32)
    rows, tokens = mask.shape
    if output.ndim >= 2 and output.shape[0] == 1:  # the same of all rows, such as positions
        output = output.expand(rows, *output.shape[1:])
    if output.shape[:2] == (rows, tokens):
        return output[mask]
    if output.ndim == 4 and (output.shape[0], output.shape[2]) == (rows, tokens):
        return output.transpose(1, 2)[mask]
    return output if bool(mask.all()) else None


def _row(moments: Moments) -> dict[str, Any]:
    return {
        "count": moments.count,
        "mean": moments.mean,
        "stdev": moments.stdev,
        "kurtosis": moments.kurtosis,
        "abs_max": moments.abs_max,
    }


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)
