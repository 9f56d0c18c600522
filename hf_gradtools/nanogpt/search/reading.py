"""YAML and JSON as explorations need them: no key twice, `1e-3` is a number, only plain values."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


__all__ = ["GrammarError", "as_yaml", "config_key", "parse_value", "read_documents"]

YAML, JSON = "yaml", "json"
FORMATS = {".yaml": YAML, ".yml": YAML, ".json": JSON}
# YAML 1.1, as PyYAML reads it, takes 1e-3 and 3E8 for text: a number there needs a dot and a signed exponent.
FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)?\.?[0-9]+(?:\.)?[eE][-+]?[0-9]+$")


class GrammarError(ValueError):
    """An exploration says something that has no meaning; names its file, document and key."""


def read_documents(path: str | Path, format: str | None = None) -> list[Any]:
    """The documents of a YAML or JSON file; a file that is one list holds one document in each element.

    Args:
        path (`str` or `Path`): the file.
        format (`str`, *optional*): "yaml" or "json"; default by the ending, YAML where it says nothing.

    Returns:
        `list`: plain values, in the order of the file, empty documents left out.

    Raises:
        GrammarError: the file cannot be parsed, is empty, or has a key twice.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if format not in (None, *FORMATS.values()):
        raise ValueError(f"config_format={format!r} is unknown. Pass 'yaml' or 'json'.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if (format or FORMATS.get(path.suffix.lower(), YAML)) == JSON:
            loaded = [json.loads(text, object_pairs_hook=_unique)]
        else:
            loaded = list(_yaml().load_all(text, _loader()))
    except (ValueError, _yaml().YAMLError) as error:
        raise GrammarError(f"{path}: {' '.join(str(error).split())}") from error
    if len(loaded) == 1 and isinstance(loaded[0], list):
        loaded = loaded[0]
    documents = [document for document in loaded if document is not None]
    if not documents:
        raise GrammarError(f"{path} holds no document. Write parameters into it, such as `n_layer: [2, 4]`.")
    return documents


def parse_value(text: str) -> Any:
    """One value as it would stand in a YAML file: `true`, `1e-3`, `[1, 2]`, or a text."""
    try:
        return _yaml().load(text, _loader())
    except _yaml().YAMLError:
        return text


def as_yaml(value: Any, **options: Any) -> str:
    """`value` as a YAML document whose keys keep their order."""
    return _yaml().safe_dump(value, sort_keys=False, allow_unicode=True, **options)


def config_key(config: Mapping[str, Any]) -> str:
    """Names a configuration: the same for the same parameters in any order.

    Args:
        config (`Mapping[str, Any]`): plain values by parameter.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    text = json.dumps(dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Explorations are read by PyYAML: pip install 'hf_gradtools[sweep]'") from error
    return yaml


@functools.cache
def _loader() -> Any:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):
        """`SafeLoader` that refuses a key given twice and reads `1e-3` as a number."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            # Before `<<: *base` is merged in: what it brings may be overridden.
            _unique([(key.value, value.value) for key, value in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    return Loader


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    for key, value in pairs:
        if key in merged:
            raise ValueError(f"the key {key!r} is there twice in one mapping. Leave one of them.")
        merged[key] = value
    return merged
