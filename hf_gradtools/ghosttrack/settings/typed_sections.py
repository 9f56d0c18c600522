"""YAML into nested dataclasses, strictly: what is unknown, missing or of another type is named with its file."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar


__all__ = ["from_mapping", "import_yaml", "load_yaml", "parse_override"]

T = TypeVar("T")
WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    types.NoneType: "null",
    list[int]: "a list of integers",
    list[str]: "a list of texts",
}


def import_yaml() -> Any:
    """The yaml module.

    Raises:
        ImportError: pyyaml is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "GhostTrack configurations are YAML files, which need pyyaml: pip install 'hf_gradtools[ghosttrack]'"
        ) from error
    return yaml


def load_yaml(path: Path) -> dict[str, Any]:
    """A file's content, which must be sections by name."""
    yaml = import_yaml()
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}. Start from the shipped template.yaml.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {_short(content)}; need sections such as model:. Start from template.yaml.")
    return content


def parse_override(override: str, sections: Mapping[str, Sequence[str]]) -> tuple[tuple[str, str], Any]:
    """`"sae.k=64"` into `(("sae", "k"), 64)`."""
    yaml = import_yaml()
    place, equals, text = override.partition("=")
    section, _, key = place.strip().partition(".")
    known = [f"{name}.{key}" for name, keys in sections.items() for key in keys]
    if not equals or key not in sections.get(section, ()):
        close = difflib.get_close_matches(place.strip(), known, 1)
        hint = f" Did you mean {close[0]}=...?" if close else ""
        raise ValueError(f"override {override!r} sets no known key; write section.key=value, such as sae.k=64.{hint}")
    try:
        return (section, key), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r} has no YAML value: {error}. Quote it.") from error


def from_mapping(cls: type[T], content: Mapping[Any, Any], source: str, places: Mapping[str, str] | None = None) -> T:
    """Builds a dataclass whose fields are dataclasses.

    Args:
        cls (`type`): the outer dataclass.
        content (`Mapping`): section, then key, then value.
        source (`str`): the file, for errors.
        places (`Mapping[str, str]`, *optional*): for errors, where a `section.key` came from if not from the file.

    Raises:
        ValueError: a section or key is unknown or missing, a value has the wrong type, or `cls` refuses it.
    """
    section_types = typing.get_type_hints(cls)
    _check_keys(cls, content, source, "")
    built = {}
    for name, values in content.items():
        if not isinstance(values, dict):
            raise ValueError(f"{source}: {name}={_short(values)} is not a section; need keys below it.")
        section = section_types[name]
        _check_keys(section, values, source, f"{name}.")
        hints = typing.get_type_hints(section)
        arguments = {}
        for key, value in values.items():
            place = (places or {}).get(f"{name}.{key}", source)
            arguments[key] = _convert(value, hints[key], f"{place}: {name}.{key}")
        try:
            built[name] = section(**arguments)
        except ValueError as error:
            raise ValueError(f"{source}: {name}.{error}") from error
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_keys(cls: Any, content: Mapping[Any, Any], source: str, prefix: str) -> None:
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    for key, value in content.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1, cutoff=0.5)
            hint = f"Did you mean {prefix}{close[0]}?" if close else f"Known are {', '.join(known)}."
            raise ValueError(f"{source}: {prefix}{key}={_short(value)} is no known key. {hint}")
    for name, entry in known.items():
        needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if needed and name not in content:
            has = ", ".join(map(str, content)) or "nothing"
            raise ValueError(f"{source}: {prefix}{name} is missing; there is {has}. Write {prefix}{name}.")


def _convert(value: Any, hint: Any, place: str) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a text
        try:
            return float(value)
        except ValueError:
            pass
    if float in allowed and type(value) is int:
        return float(value)
    lists = (kind for kind in allowed if typing.get_origin(kind) is list)
    if type(value) in allowed or any(_is_list_of(typing.get_args(kind)[0], value) for kind in lists):
        return value
    raise ValueError(f"{place}={_short(value)} is of type {type(value).__name__}; need {_words(allowed)}.")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _words(allowed: Iterable[Any]) -> str:
    return " or ".join(WORDS[kind] for kind in allowed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
