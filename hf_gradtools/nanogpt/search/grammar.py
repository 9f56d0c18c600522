"""From a document of an exploration to the configurations of its runs. Pure functions; files are read elsewhere."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_gradtools.nanogpt.search.reading import GrammarError
from hf_gradtools.nanogpt.search.specs import Axis, Conditional, parse_spec, same


__all__ = ["Combination", "expand_document"]

GROUPS, COMMON, SETTINGS, NAME = "parameter_groups", "common_group", "named_group_settings", "named_group"
STATIC, VARIATIONS, ALTERNATES = "named_group_static", "named_group_variations", "named_group_alternates"
STATIC_DEFINITIONS, VARIATION_DEFINITIONS = "named_static_groups", "named_variation_groups"
LIBRARIES = "named_group_libraries"
IN_GROUPS = {GROUPS, SETTINGS, STATIC, VARIATIONS, ALTERNATES}
AT_TOP = {COMMON, STATIC_DEFINITIONS, VARIATION_DEFINITIONS, LIBRARIES}
RESERVED = IN_GROUPS | AT_TOP | {NAME}
MOST_RUNS = 100_000  # of one document: more is a slip

Spec = Axis | Conditional


@dataclass(frozen=True)
class Combination:
    """The configuration of one run.

    Args:
        config: value by parameter, in the order of the document.
        groups: the named groups that it consists of.
        common: parameters of `common_group`.
        grouped: parameters that came with a named group.
    """

    config: dict[str, Any]
    groups: tuple[str, ...] = ()
    common: frozenset[str] = frozenset()
    grouped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Leaf:
    """Parameters that are multiplied out, once all groups are merged."""

    specs: dict[str, Spec] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    grouped: frozenset[str] = frozenset()

    def named(self, name: str) -> _Leaf:
        return replace(self, groups=(*self.groups, name), grouped=self.grouped | frozenset(self.specs))


def expand_document(document: Any, where: str) -> list[Combination]:
    """The runs that one document asks for, in its order: groups outermost, the last parameter turning fastest.

    Args:
        document (`Any`): a mapping of parameters and of `parameter_groups`, `common_group`, `named_static_groups`,
            `named_variation_groups`, `named_group_static`, `named_group_variations`, `named_group_alternates`.
        where (`str`): file and document, for errors.

    Returns:
        `list[Combination]`: with duplicates, if the document has them.

    Raises:
        GrammarError: naming file, document and key, for whatever has no meaning: an unknown key of the grammar, an
            empty list, a parameter with two values in one run, conditions that no run meets.
    """
    if not isinstance(document, Mapping):
        raise GrammarError(f"{where} is {document!r}. Write a mapping of parameters, such as `n_layer: [2, 4]`.")
    _check_keys(document, where)
    registry = _Registry(document, where)
    common = _common(document.get(COMMON, {}), f"{where}: {COMMON}")
    own = {key: value for key, value in document.items() if key not in AT_TOP}
    leaves = registry.expand(own, f"{where}: ", ())
    runs = sum(math.prod(len(spec.values) for spec in leaf.specs.values()) for leaf in leaves)
    if runs > MOST_RUNS:
        raise GrammarError(f"{where} multiplies out to {runs:,} runs; at most {MOST_RUNS:,} are possible.")
    met: set[str] = set()
    combinations = [combination for leaf in leaves for combination in _multiply(leaf, common, where, met)]
    _check_conditions(leaves, met, combinations)
    return combinations


def _multiply(leaf: _Leaf, common: Mapping[str, Any], where: str, met: set[str]) -> Iterator[Combination]:
    """The runs of a leaf; adds to `met` the places of the conditions that held."""
    axes = {name: spec.values for name, spec in leaf.specs.items() if isinstance(spec, Axis)}
    conditionals = _ordered({name: spec for name, spec in leaf.specs.items() if isinstance(spec, Conditional)})
    for values in itertools.product(*axes.values()):
        configs = [_joined(common, dict(zip(axes, values, strict=True)), where)]
        for name, spec in conditionals.items():
            if name in common:
                raise GrammarError(f"{spec.place} is in {COMMON} too, with {common[name]!r}. Leave it in one place.")
            following = []
            for config in configs:
                if spec.holds(config):
                    met.add(spec.place)
                    following += [{**config, name: value} for value in spec.values]
                else:
                    following.append(config)
            configs = following
        for config in configs:
            yield Combination(config, tuple(dict.fromkeys(leaf.groups)), frozenset(common), leaf.grouped)


def _ordered(conditionals: Mapping[str, Conditional]) -> dict[str, Conditional]:
    """Each after those that its conditions name, else as they are written."""
    waiting, ordered = dict(conditionals), {}
    while waiting:
        free = (name for name, spec in waiting.items() if not spec.names() & waiting.keys())
        if (name := next(free, None)) is None:
            spec = next(iter(waiting.values()))
            raise GrammarError(f"{spec.place}: the conditions of {', '.join(waiting)} depend on each other in a ring.")
        ordered[name] = waiting.pop(name)
    return ordered


def _joined(common: Mapping[str, Any], config: dict[str, Any], where: str) -> dict[str, Any]:
    for name in common.keys() & config.keys():
        if not same(common[name], config[name]):
            raise GrammarError(
                f"{where}: {name} is {common[name]!r} in {COMMON} and {config[name]!r} elsewhere. "
                "Leave it in one place."
            )
    return {**common, **config}


def _check_conditions(leaves: Sequence[_Leaf], met: set[str], combinations: Sequence[Combination]) -> None:
    for leaf in leaves:
        for spec in leaf.specs.values():
            if isinstance(spec, Conditional) and spec.place not in met:
                wanted = " or ".join(", ".join(f"{k}={v!r}" for k, v in clause.items()) for clause in spec.clauses)
                set_names = {name for combination in combinations for name in combination.config}
                never = sorted({name for clause in spec.clauses for name in clause} - set_names)
                why = f"No run sets {', '.join(never)}." if never else "No run has these values."
                if any(isinstance(value, list) for clause in spec.clauses for value in clause.values()):
                    why += " A list is one value here; for several of which one must hold, write several mappings."
                raise GrammarError(f"{spec.place}: its conditions {wanted} never hold. {why}")


def _common(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise GrammarError(f"{place} is {value!r}. Write a mapping of parameters with one value each.")
    common = {}
    for name, given in value.items():
        if name in RESERVED:
            raise GrammarError(f"{place} cannot hold {name!r}: its parameters have one value each.")
        spec = parse_spec(given, f"{place}.{name}")
        if isinstance(spec, Conditional) or len(spec.values) != 1:
            raise GrammarError(
                f"{place}.{name} is {given!r}; a common parameter has one value. Move it out of {COMMON}."
            )
        common[name] = spec.values[0]
    return common


class _Registry:
    """The named groups of a document, and how groups are merged."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self.definitions: dict[str, dict[str, Any]] = {}
        self.static: set[str] = set()
        for kind in (STATIC_DEFINITIONS, VARIATION_DEFINITIONS):
            for index, entry in enumerate(_listed(document.get(kind, []))):
                place = f"{where}: {kind}[{index}]"
                if not isinstance(entry, Mapping) or not isinstance(entry.get(NAME), str):
                    raise GrammarError(f"{place} needs a {NAME!r} that names it.")
                if entry[NAME] in self.definitions:
                    raise GrammarError(f"{place}: a group is named {entry[NAME]!r} already. Rename one of them.")
                self.definitions[entry[NAME]] = {key: value for key, value in entry.items() if key != NAME}
                if kind == STATIC_DEFINITIONS:
                    self.static.add(entry[NAME])
        self.where = where

    def expand(self, group: Any, place: str, inside: tuple[str, ...]) -> list[_Leaf]:
        """The leaves of a group, with all that it names and contains merged in."""
        if not isinstance(group, Mapping):
            raise GrammarError(f"{place.rstrip('. ')} is {group!r}. Write a mapping of parameters.")
        if misplaced := sorted((AT_TOP | {NAME}) & group.keys()):
            raise GrammarError(f"{place}{misplaced[0]} belongs to the top of the document.")
        own = {name: parse_spec(value, f"{place}{name}") for name, value in group.items() if name not in RESERVED}
        leaves = [_Leaf(own)]
        if SETTINGS in group:
            leaves = _merge(leaves, self.expand(group[SETTINGS], f"{place}{SETTINGS}.", inside), place)
        for key in (STATIC, VARIATIONS):
            for name in self._names(group, key, place):
                leaves = _merge(leaves, self._named(name, key, place, inside), place)
        if alternates := self._names(group, ALTERNATES, place):
            choices = [leaf for name in alternates for leaf in self._named(name, ALTERNATES, place, inside)]
            leaves = _merge(leaves, choices, place)
        if GROUPS in group:
            groups = _listed(group[GROUPS])
            if not groups:
                raise GrammarError(
                    f"{place}{GROUPS} is empty, which makes no run. Write a group, or leave the key out."
                )
            parts = [self.expand(part, f"{place}{GROUPS}[{index}].", inside) for index, part in enumerate(groups)]
            # Groups outermost: all runs of the first before any of the second.
            leaves = [leaf for part in parts for leaf in _merge(leaves, part, place)]
        return leaves

    def _names(self, group: Mapping[str, Any], key: str, place: str) -> list[str]:
        if key not in group:
            return []
        names = _listed(group[key])
        if not names:
            raise GrammarError(f"{place}{key} is empty. Name a group, or leave the key out.")
        return names

    def _named(self, name: Any, key: str, place: str, inside: tuple[str, ...]) -> list[_Leaf]:
        known = self.static if key == STATIC else set(self.definitions) - (self.static if key == VARIATIONS else set())
        if name not in known:
            raise GrammarError(f"{place}{key} names {name!r}; the groups are {', '.join(sorted(known)) or 'none'}.")
        if name in inside:
            raise GrammarError(f"{place}{key} names {name!r} within itself: {' > '.join((*inside, name))}.")
        leaves = self.expand(self.definitions[name], f"{self.where}: {name}.", (*inside, name))
        if name not in self.static:
            return leaves
        if len(leaves) != 1 or any(isinstance(s, Axis) and len(s.values) != 1 for s in leaves[0].specs.values()):
            raise GrammarError(
                f"{self.where}: the static group {name!r} has several values. Move it to {VARIATION_DEFINITIONS}."
            )
        return [leaves[0].named(name)]


def _merge(left: Sequence[_Leaf], right: Sequence[_Leaf], place: str) -> list[_Leaf]:
    return [_merged(one, other, place) for one in left for other in right]


def _merged(one: _Leaf, other: _Leaf, place: str) -> _Leaf:
    for name in one.specs.keys() & other.specs.keys():
        first, second = one.specs[name], other.specs[name]
        equal = isinstance(first, Axis) and isinstance(second, Axis) and same(list(first.values), list(second.values))
        if not equal:
            raise GrammarError(
                f"{place}{name} is given twice for the same run, as {_told(first)} and as {_told(second)}. "
                "Leave it in one place."
            )
    return _Leaf({**one.specs, **other.specs}, one.groups + other.groups, one.grouped | other.grouped)


def _told(spec: Spec) -> str:
    return f"{list(spec.values)!r}" + (" under conditions" if isinstance(spec, Conditional) else "")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_keys(document: Mapping[str, Any], where: str) -> None:
    """No key that was meant for the grammar and is misspelt, at any depth."""
    for key, value in document.items():
        if not isinstance(key, str):
            raise GrammarError(f"{where}: the key {key!r} is a {type(key).__name__}. Put it into quotes.")
        meant = difflib.get_close_matches(key, RESERVED, n=1, cutoff=0.85)
        if key not in RESERVED and (meant or key.startswith("named_")):
            known = f"Did you mean {meant[0]!r}?" if meant else f"The keys are {', '.join(sorted(RESERVED))}."
            raise GrammarError(f"{where}: {key!r} is no key of the grammar. {known}")
        for part in _listed(value) if key in RESERVED else []:
            if isinstance(part, Mapping):
                _check_keys(part, f"{where}: {key}")
