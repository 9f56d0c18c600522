"""Classifiers on disk: `classifier.json` (what it is) and `classifier.safetensors` (its arrays). No pickle, ever.

Reading runs no code from the files: the JSON names one of our own kinds, and every array is checked against what that
kind needs, by name, type, shape and meaning.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hf_gradtools.core.atomic import atomic_write, write_json_atomically
from hf_gradtools.ghosttrack.classifiers.frozen import FrozenClassifier, FrozenEnsemble, FrozenLinear, FrozenTrees


__all__ = ["CLASSIFIER_ARRAYS", "CLASSIFIER_JSON", "load_classifier", "save_classifier"]

CLASSIFIER_JSON = "classifier.json"
CLASSIFIER_ARRAYS = "classifier.safetensors"
FORMAT, VERSION = "hf_gradtools.classifier", 1
KINDS: dict[str, type[FrozenClassifier]] = {kind.KIND: kind for kind in (FrozenLinear, FrozenTrees, FrozenEnsemble)}
CODE_ENDINGS = (".pkl", ".pickle", ".joblib", ".skops", ".bin", ".pt", ".pth", ".dill", ".npy", ".npz")
SAVE_AGAIN = "Save it with save_classifier (HallucinationDetector.save_pretrained does) and pass that folder."


def save_classifier(classifier: FrozenClassifier, folder: str | os.PathLike[str]) -> None:
    """Writes the classifier's two files to `folder`, each whole or not at all, and the JSON last.

    Between the two an older JSON names the checksum of older arrays, which [`load_classifier`] reports.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    description = {"format": FORMAT, "version": VERSION} | _describe(classifier, "", arrays)
    content = save(arrays)
    description["sha256"] = hashlib.sha256(content).hexdigest()
    with atomic_write(folder / CLASSIFIER_ARRAYS) as file:
        file.write(content)
    write_json_atomically(folder / CLASSIFIER_JSON, description)


def load_classifier(folder: str | os.PathLike[str]) -> FrozenClassifier:
    """Reads what [`save_classifier`] wrote.

    Raises:
        ValueError: the folder holds no classifier of this format, a pickle in its place, or arrays that are missing,
            too many, of another type or shape, or not what the kind allows. Nothing in the files is executed.
    """
    folder = Path(folder)
    _refuse_code(folder)
    content = (folder / CLASSIFIER_ARRAYS).read_bytes()
    description = _read_description(folder / CLASSIFIER_JSON)
    if hashlib.sha256(content).hexdigest() != description.get("sha256"):
        raise ValueError(
            f"{folder / CLASSIFIER_ARRAYS} is not the file that {CLASSIFIER_JSON} was written with (its sha256 "
            f"differs): damaged, half replaced or of another classifier. {SAVE_AGAIN}"
        )
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / CLASSIFIER_ARRAYS} is no safetensors file ({error}). {SAVE_AGAIN}") from error
    try:
        classifier = _build(description, "", arrays, may_nest=True)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} holds no whole classifier: {_reason(error)}. {SAVE_AGAIN}") from error
    if arrays:
        raise ValueError(f"{folder} holds no whole classifier: it has an extra array {min(arrays)!r}. {SAVE_AGAIN}")
    return classifier


def _refuse_code(path: Path) -> None:
    """Names what is in place of a classifier; reads no more than names."""
    if path.is_file():
        why = "may run code when it is loaded, so it is not opened" if path.suffix in CODE_ENDINGS else "is a file"
        raise ValueError(f"{path} {why}; need a folder with {CLASSIFIER_JSON} and {CLASSIFIER_ARRAYS}. {SAVE_AGAIN}")
    missing = [name for name in (CLASSIFIER_JSON, CLASSIFIER_ARRAYS) if not (path / name).is_file()]
    if not missing:
        return
    found = sorted(file.name for file in path.iterdir() if file.suffix in CODE_ENDINGS) if path.is_dir() else []
    instead = f"; {found[0]} in its place may run code when it is loaded, so it is not opened" if found else ""
    raise ValueError(f"{path} has no {missing[0]}{instead}. {SAVE_AGAIN}")


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({type(error).__name__}). {SAVE_AGAIN}") from error
    known = isinstance(description, dict) and description.get("format") == FORMAT
    if not known or description.get("version") != VERSION:
        raise ValueError(f"{path} is not of format {FORMAT!r}, version {VERSION}. {SAVE_AGAIN}")
    return description


def _options(kind: type[FrozenClassifier]) -> list[str]:
    """Fields that go to the JSON as they are."""
    return [field.name for field in fields(kind) if field.name not in (*kind.ARRAYS, "members")]


def _describe(classifier: FrozenClassifier, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    for name, (dtype, _) in classifier.ARRAYS.items():
        # ascontiguousarray makes a number a row of one
        value = np.asarray(getattr(classifier, name), dtype=dtype)
        arrays[prefix + name] = np.ascontiguousarray(value).reshape(value.shape)
    description = {"kind": classifier.KIND} | {name: getattr(classifier, name) for name in _options(type(classifier))}
    if isinstance(classifier, FrozenEnsemble):
        description["members"] = [
            _describe(member, f"{prefix}members.{index}.", arrays) for index, member in enumerate(classifier.members)
        ]
    return description


def _build(
    description: dict[str, Any], prefix: str, arrays: dict[str, np.ndarray], *, may_nest: bool
) -> FrozenClassifier:
    """Takes its arrays out of `arrays`."""
    kind = KINDS[description["kind"]]
    options = {name: description[name] for name in _options(kind)}
    _check_options(options)
    if kind is FrozenEnsemble:
        if not may_nest:
            raise ValueError("an ensemble is a member of an ensemble")
        options["members"] = [
            _build(member, f"{prefix}members.{index}.", arrays, may_nest=False)
            for index, member in enumerate(description["members"])
        ]
        if any(member.n_features != options["n_features"] for member in options["members"]):
            raise ValueError("its members take other numbers of features than itself")
    sizes: dict[str, int] = {}
    for name, (dtype, axes) in kind.ARRAYS.items():
        options[name] = _checked_array(arrays, prefix + name, dtype, axes, sizes)
    classifier = kind(**options)
    classifier.check()
    return classifier


def _check_options(options: dict[str, Any]) -> None:
    n_features, metadata = options["n_features"], options["metadata"]
    if type(n_features) is not int or n_features < 0:
        raise ValueError(f"n_features={n_features!r} is no number of features")
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no mapping")
    for name in ("boosted", "single_precision"):
        if not isinstance(options.get(name, True), bool):
            raise ValueError(f"{name}={options[name]!r} is neither true nor false")


def _checked_array(
    arrays: dict[str, np.ndarray], name: str, dtype: str, axes: tuple[str, ...], sizes: dict[str, int]
) -> np.ndarray:
    """`sizes`: lengths of the axes met so far; an axis has one length in all arrays of a classifier."""
    if name not in arrays:
        raise ValueError(f"array {name!r} is missing")
    array = arrays.pop(name)
    shape_fits = array.ndim == len(axes) and all(
        sizes.setdefault(axis, length) == length for axis, length in zip(axes, array.shape, strict=True)
    )
    if array.dtype != np.dtype(dtype) or not shape_fits:
        need = [sizes.get(axis, axis) for axis in axes]
        raise ValueError(f"array {name!r} is {array.dtype} {list(array.shape)}, not {dtype} {need}")
    if not np.isfinite(array).all():
        raise ValueError(f"array {name!r} has NaN or infinity")
    return array


def _reason(error: Exception) -> str:
    return f"{error} is unknown or missing" if isinstance(error, KeyError) else str(error)
