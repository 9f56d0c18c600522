"""The configurations that one round of the greedy search tries."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hf_gradtools.nanogpt.search.reading import config_key


__all__ = ["Candidate", "candidates", "check_parameters"]

LAYERS, LAYERLIST = "n_layer", "_layerlist"
UP, DOWN, BOTH = DIRECTIONS = ("up", "down", "both")
MIDDLE, EACH = DUPLICATIONS = ("dup_middle", "dup_each")


@dataclass(frozen=True)
class Candidate:
    """A configuration one step away from another.

    Args:
        param (`str`): what differs: `n_embd`, or `mlp_size[1]` for an element of a list.
        value (`Any`): its value; for `n_layer` which layer was duplicated or left out, and how many there are now.
        config (`dict[str, Any]`): all flags.
    """

    param: str
    value: Any
    config: dict[str, Any]


def check_parameters(baseline: Mapping[str, Any], increments: Mapping[str, float]) -> None:
    """ValueError if a parameter is not in the baseline, or nothing that its increment can be added to."""
    for name, increment in increments.items():
        if name not in baseline:
            raise ValueError(
                f"param_names={name!r} is not in orig_settings ({', '.join(baseline)}). Write its value there."
            )
        value = baseline[name]
        if not _is_number(value) and not (isinstance(value, list) and any(map(_is_number, value))):
            raise ValueError(
                f"param_names={name!r} is {value!r}; only numbers, and numbers in lists, can be incremented."
            )
        if name == LAYERS and not isinstance(value, int):
            raise ValueError(f"param_names='n_layer' is {value!r}; it must be a whole number.")
        whole = [each for each in (value if isinstance(value, list) else [value]) if _is_whole(each)]
        if whole and not float(increment).is_integer():
            raise ValueError(
                f"param_names={name!r} is the whole number {whole[0]}, which an increment of {increment} would not "
                f"leave one. Write {float(whole[0])} in orig_settings if it may be a fraction, or a whole increment."
            )


def candidates(
    baseline: Mapping[str, Any],
    increments: Mapping[str, float],
    iterations: int,
    *,
    direction: str = UP,
    nlayer_dup_mode: str = MIDDLE,
    layer_lists: Iterable[str] = (),
) -> list[Candidate]:
    """All configurations that differ from a baseline by 1 to `iterations` increments of one parameter.

    A list is changed one element at a time. More layers means that one of them is duplicated, its elements in lists of
    layers with it; fewer, that one of them is left out.

    Args:
        baseline (`Mapping[str, Any]`): all flags.
        increments (`Mapping[str, float]`): by parameter.
        iterations (`int`): the largest multiple of an increment.
        direction (`str`, defaults to `"up"`): "up" adds, "down" subtracts, "both" does both.
        nlayer_dup_mode (`str`, defaults to `"dup_middle"`): the middle layer is duplicated; with "dup_each", each of
            them in a candidate of its own.
        layer_lists (`Iterable[str]`): flags whose lists have one element for each layer, or are cycled over them;
            those that end in `_layerlist` always have.

    Returns:
        `list[Candidate]`: no two of the same configuration, none equal to the baseline.
    """
    layer_lists = frozenset(layer_lists)
    signs = {UP: (1,), DOWN: (-1,), BOTH: (1, -1)}[direction]
    found: dict[str, Candidate] = {}
    for name, increment in increments.items():
        for sign in signs:
            for multiple in range(1, iterations + 1):
                for candidate in _steps(
                    baseline, name, sign * multiple * Decimal(repr(increment)), nlayer_dup_mode, layer_lists
                ):
                    found.setdefault(config_key(candidate.config), candidate)
    found.pop(config_key(baseline), None)
    return list(found.values())


def _steps(
    baseline: Mapping[str, Any], name: str, change: Decimal, duplication: str, layer_lists: frozenset[str]
) -> list[Candidate]:
    value = baseline[name]
    if name == LAYERS:
        middle = (value - 1) // 2
        chosen = [middle] if duplication == MIDDLE else range(value)
        return [_layers(baseline, index, int(round(change)), layer_lists) for index in chosen]
    if isinstance(value, list):
        return [
            Candidate(f"{name}[{index}]", new, _with(baseline, name, [*value[:index], new, *value[index + 1 :]]))
            for index, element in enumerate(value)
            if _is_number(element)
            for new in [_added(element, change)]
        ]
    return [Candidate(name, _added(value, change), _with(baseline, name, _added(value, change)))]


def _layers(baseline: Mapping[str, Any], index: int, change: int, layer_lists: frozenset[str]) -> Candidate:
    """One layer several times more, or that one and those after it left out."""
    count = baseline[LAYERS]
    config = _with(baseline, LAYERS, count + change)
    for name, value in baseline.items():
        if isinstance(value, list) and value and (name in layer_lists or name.endswith(LAYERLIST)):
            whole = [value[layer % len(value)] for layer in range(count)]
            if change >= 0:
                config[name] = (
                    whole[: index + 1] + [copy.deepcopy(whole[index]) for _ in range(change)] + whole[index + 1 :]
                )
            else:
                first = max(0, min(index, count + change))
                config[name] = whole[:first] + whole[first - change :]
    key = "dup" if change >= 0 else "drop"
    return Candidate(LAYERS, {key: index, "new_layers": count + change}, config)


def _with(baseline: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**copy.deepcopy(dict(baseline)), name: value}


def _added(value: int | float, change: Decimal) -> int | float:
    """`value + change`, exactly in decimal; a whole number stays one."""
    total = Decimal(repr(value)) + change
    return int(round(total)) if isinstance(value, int) else float(total)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
