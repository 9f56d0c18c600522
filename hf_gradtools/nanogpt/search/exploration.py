"""An exploration file as a list of named runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_gradtools.nanogpt.search.grammar import (
    LIBRARIES,
    STATIC_DEFINITIONS,
    VARIATION_DEFINITIONS,
    Combination,
    expand_document,
)
from hf_gradtools.nanogpt.search.reading import GrammarError, config_key, read_documents


__all__ = ["Run", "read_exploration"]

logger = logging.get_logger(__name__)

RUN_NAME = "${RUN_NAME}"  # in a text value, replaced by the run's name


@dataclass(frozen=True)
class Run:
    """One configuration to run.

    Args:
        config (`dict[str, Any]`): value by flag.
        name (`str`): for people; unique within an exploration.
        tags (`dict[str, Any]`): whatever else the storage shall keep of it.
    """

    config: dict[str, Any]
    name: str
    tags: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identifies the configuration, whatever the run is called."""
        return config_key(self.config)

    def flags(self) -> dict[str, Any]:
        """The configuration with the run's name where it asks for it."""
        return {flag: _filled(value, self.name) for flag, value in self.config.items()}


def read_exploration(
    path: str | Path,
    *,
    format: str | None = None,
    prefix: str = "",
    include_common_group_in_name: bool = False,
    expand_named_groups_in_names: bool = False,
) -> list[Run]:
    """The runs of an exploration: every document multiplied out, in the order of the file, each configuration once.

    Args:
        path (`str` or `Path`): YAML or JSON in the grammar of
            [`~hf_gradtools.nanogpt.search.grammar.expand_document`].
        format (`str`, *optional*): "yaml" or "json"; default by the ending of the file.
        prefix (`str`, defaults to `""`): of the runs' names.
        include_common_group_in_name (`bool`, defaults to `False`): values of `common_group` are part of names.
        expand_named_groups_in_names (`bool`, defaults to `False`): names have the values of named groups, not the
            groups' names.

    Returns:
        `list[Run]`: at least one.

    Raises:
        GrammarError: something in the file has no meaning.
    """
    path = Path(path)
    runs: dict[str, Run] = {}
    repeated: Counter[str] = Counter()
    documents = read_documents(path, format)
    for number, document in enumerate(documents, 1):
        where = f"{path}, document {number}"
        for combination in expand_document(_with_libraries(document, path, where), where):
            parts = _name_parts(combination, include_common_group_in_name, expand_named_groups_in_names)
            run = Run(combination.config, "-".join([f"{prefix}{path.stem}", *parts]))
            if run.key in runs:
                repeated[runs[run.key].name] += 1
            else:
                runs[run.key] = run
    if repeated:
        logger.warning(
            f"{path} asks {repeated.total()} times for a run it has already; these run once: {', '.join(repeated)}."
        )
    return _distinct(list(runs.values()))


def _name_parts(combination: Combination, with_common: bool, with_grouped: bool) -> list[str]:
    hidden = (frozenset() if with_common else combination.common) | (
        frozenset() if with_grouped else combination.grouped
    )
    values = [value for flag, value in combination.config.items() if flag not in hidden]
    return [
        *([] if with_grouped else combination.groups),
        *(str(value) for value in values if not (isinstance(value, str) and RUN_NAME in value)),
    ]


def _distinct(runs: list[Run]) -> list[Run]:
    """Runs that differ in what names leave out get the beginning of their keys appended."""
    names = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.name}-{run.key[:6]}") if names[run.name] > 1 else run for run in runs]


def _with_libraries(document: Any, path: Path, where: str) -> Any:
    """The document with the named groups of the files that it names, relative to its own."""
    if not isinstance(document, Mapping) or LIBRARIES not in document:
        return document
    merged = dict(document)
    names = document[LIBRARIES] if isinstance(document[LIBRARIES], list) else [document[LIBRARIES]]
    for name in names:
        library = path.parent / str(name)
        if not library.is_file():
            raise GrammarError(f"{where}: {LIBRARIES} names {name!r}, and there is no file {library}.")
        groups = read_documents(library)
        definitions = {STATIC_DEFINITIONS, VARIATION_DEFINITIONS}
        if len(groups) != 1 or not isinstance(groups[0], Mapping) or groups[0].keys() - definitions:
            raise GrammarError(
                f"{library} must be one document of {' and '.join(sorted(definitions))}, and nothing else."
            )
        for kind, entries in groups[0].items():
            merged[kind] = [*merged.get(kind, []), *entries]
    return merged


def _filled(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value.replace(RUN_NAME, name)
    return [_filled(element, name) for element in value] if isinstance(value, list) else value
