"""What one parameter of an exploration may be: a constant, an axis, a range, or options under conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hf_gradtools.nanogpt.search.reading import GrammarError


__all__ = ["Axis", "Conditional", "expand_range", "parse_spec", "same"]

RANGE, CONDITIONS, OPTIONS = "range", "conditions", "options"
RANGE_KEYS = {"start", "end", "step"}
MOST_VALUES = 100_000  # of a range: more is a slip of the step


@dataclass(frozen=True)
class Axis:
    """The values that a parameter takes, one in each run."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Conditional:
    """Values that a parameter takes where one of `clauses` holds wholly; elsewhere the parameter is not set.

    Args:
        place: of the parameter, for errors.
        clauses: each asks for all its values.
        values: as of an [`Axis`].
    """

    place: str
    clauses: tuple[Mapping[str, Any], ...]
    values: tuple[Any, ...]

    def names(self) -> set[str]:
        """The parameters that the conditions look at."""
        return {name for clause in self.clauses for name in clause}

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` meets the conditions."""
        return any(
            all(name in config and same(config[name], value) for name, value in clause.items())
            for clause in self.clauses
        )


def expand_range(start: int | float, end: int | float, step: int | float | None = None) -> list[Any]:
    """Values from `start` to `end`, with `end` among them where a step lands on it; none lies beyond it.

    Every value is `start + i * step` in decimal arithmetic: `0.1, 0.5, 0.1` gives five values, `0.3` among them.

    Args:
        start (`int` or `float`): the first value.
        end (`int` or `float`): the last value that may appear.
        step (`int` or `float`, *optional*): between values, negative to go down; default 1 for integers and 0.1
            otherwise, towards `end`.

    Returns:
        `list`: ints if all three are, else floats.

    Raises:
        ValueError: `step` is 0, leads away from `end`, or is so small that there are more than 100,000 values.
    """
    whole = all(isinstance(number, int) for number in (start, end, *([] if step is None else [step])))
    if step is None:
        step = (1 if whole else 0.1) * (1 if end >= start else -1)
    if step == 0:
        raise ValueError("step is 0. Write one that leads from start to end.")
    first, last, stride = (Decimal(repr(number)) for number in (start, end, step))
    if (last - first) * stride < 0:
        raise ValueError(f"step={step!r} leads away from end={end!r}: start is {start!r}. Write step: {-step!r}.")
    if (last - first) / stride >= MOST_VALUES:
        raise ValueError(
            f"step={step!r} makes more than {MOST_VALUES:,} values from {start!r} to {end!r}. Write a larger one."
        )
    values = [first + index * stride for index in range(int((last - first) // stride) + 1)]
    return [int(value) if whole else float(value) for value in values]


def parse_spec(value: Any, place: str) -> Axis | Conditional:
    """What an exploration says of one parameter.

    Args:
        value (`Any`): a scalar, a list, `{range: ...}` or `{conditions: ..., options: ...}`.
        place (`str`): file, document and key, for errors.

    Returns:
        `Axis` or `Conditional`.

    Raises:
        GrammarError: it is none of these.
    """
    if isinstance(value, Mapping) and value.keys() & {CONDITIONS, OPTIONS}:
        if value.keys() != {CONDITIONS, OPTIONS}:
            raise GrammarError(
                f"{place} has the keys {_listed(value)}; it needs 'conditions' and 'options', no others."
            )
        clauses = _clauses(value[CONDITIONS], f"{place}.{CONDITIONS}")
        return Conditional(place, clauses, _values(value[OPTIONS], f"{place}.{OPTIONS}"))
    return Axis(_values(value, place))


def same(left: Any, right: Any) -> bool:
    """Equality that tells true from 1, in lists too."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _values(value: Any, place: str) -> tuple[Any, ...]:
    """The values of an axis; the elements of a list stay whole, be they lists."""
    if isinstance(value, Mapping):
        return tuple(_range(value, place))
    if isinstance(value, list) and not value:
        raise GrammarError(f"{place} is an empty list, which makes no run. Write a value, or leave the key out.")
    values = tuple(value) if isinstance(value, list) else (value,)
    for element in values:
        _check_plain(element, place)
    return values


def _range(value: Mapping[str, Any], place: str) -> list[Any]:
    if value.keys() != {RANGE} or not isinstance(value[RANGE], Mapping):
        raise GrammarError(
            f"{place} is a mapping with the keys {_listed(value)}. Write {{range: {{start, end, step}}}}, "
            "{conditions, options}, a list or one value."
        )
    numbers = value[RANGE]
    if unknown := numbers.keys() - RANGE_KEYS:
        raise GrammarError(f"{place}.range has the unknown keys {_listed(unknown)}. It takes start, end and step.")
    if missing := {"start", "end"} - numbers.keys():
        raise GrammarError(f"{place}.range lacks {_listed(missing)}. Write {{start: 1, end: 4, step: 1}}.")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise GrammarError(f"{place}.range.{name} is {number!r}; it must be a number, without quotes.")
    try:
        return expand_range(**numbers)
    except ValueError as error:
        raise GrammarError(f"{place}.range: {error}") from error


def _clauses(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """A mapping: all hold. A list of mappings: any of them. A list of `[name, value]`: all hold."""
    if isinstance(value, Mapping):
        clauses = [value]
    elif isinstance(value, list) and value and all(isinstance(clause, Mapping) for clause in value):
        clauses = value
    elif isinstance(value, list) and value and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        clauses = [_merged(value, place)]
    else:
        raise GrammarError(
            f"{place} is {value!r}. Write a mapping of values that must all hold, a list of such mappings of which "
            "one must, or a list of [name, value] pairs."
        )
    for clause in clauses:
        if not clause:
            raise GrammarError(f"{place} is empty: it would always hold. Write the options as a plain list.")
        for name, wanted in clause.items():
            _check_plain(wanted, f"{place}.{name}")
    return tuple(clauses)


def _merged(pairs: Sequence[Sequence[Any]], place: str) -> dict[str, Any]:
    clause: dict[str, Any] = {}
    for name, value in pairs:
        if name in clause and not same(clause[name], value):
            raise GrammarError(
                f"{place} wants {name!r} to be {clause[name]!r} and {value!r} at once. Write a list of mappings, "
                "of which one must hold."
            )
        clause[name] = value
    return clause


def _check_plain(value: Any, place: str) -> None:
    """A scalar of JSON or a list of them."""
    if isinstance(value, list):
        for element in value:
            _check_plain(element, place)
    elif isinstance(value, Mapping):
        raise GrammarError(
            f"{place} holds the mapping {dict(value)!r} as a value. Sets of parameters that vary together go under "
            "'parameter_groups'."
        )
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise GrammarError(f"{place} is {value!r}, a {type(value).__name__}. Put it into quotes.")


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(repr, names))) or "none"
