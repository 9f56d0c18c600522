"""What the phases share: the layers they are asked for, the model, what is finished, and what they say of it."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.ghosttrack.settings.layer_selection import format_layers, parse_layers
from hf_gradtools.sae.training_config import differing


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig


__all__ = [
    "Layers",
    "PhaseSummary",
    "begin",
    "finish",
    "hookpoints_of",
    "is_finished",
    "load_language_model",
    "open_model",
    "read_finished",
    "remove",
    "results_folder",
    "told_in_a_line",
]

logger = logging.getLogger(__name__)

Layers = str | int | Sequence[int] | None
BEGUN, FINISHED = "begun.json", "finished.json"


@dataclass(frozen=True)
class PhaseSummary:
    """What a phase did.

    Attributes:
        phase (`str`): its name.
        done (`list[str]`): what it made now: hookpoints, or data sets.
        skipped (`list[str]`): what was there already.
        facts (`dict[str, Any]`): JSON values about all of it.
    """

    phase: str
    done: list[str]
    skipped: list[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [
            f"{verb} {', '.join(names)}" for verb, names in (("made", self.done), ("kept", self.skipped)) if names
        ]
        lines = [f"{self.phase}: {'; '.join(parts)}"]
        lines += [f"  {name}: {value}" for name, value in self.facts.items()]
        return "\n".join(lines)


def hookpoints_of(config: GhostTrackConfig, layers: Layers) -> list[str]:
    """`["layers.0", ...]` of the layers asked for, by default those of the configuration."""
    if layers is None:
        return config.hookpoints
    return [f"layers.{layer}" for layer in parse_layers(layers, config.model.n_layers)]


def results_folder(folder: Path, dataset: str, config: GhostTrackConfig, hookpoints: Sequence[str]) -> Path:
    """Where results on a data set go; those of other layers than the configuration's have a folder of their own."""
    if list(hookpoints) == config.hookpoints:
        return folder / dataset
    layers = format_layers([int(name.rpartition(".")[2]) for name in hookpoints])
    return folder / dataset / f"layers-{layers}"


def load_language_model(config: GhostTrackConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of the configuration in evaluation mode, on an accelerator if there is one, and its tokenizer.

    Raises:
        ValueError: it cannot be loaded, or is of another width or depth than the configuration says.
    """
    from transformers import AutoConfig

    section = config.model
    with told_in_a_line(section.base_model):
        config.check_model(AutoConfig.from_pretrained(section.base_model, revision=section.revision or "main"))
    return open_model(section.base_model, section.revision, section.dtype)


def open_model(
    name: str, revision: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode, on an accelerator if there is one, and its tokenizer.

    Raises:
        ValueError: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with told_in_a_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=revision or "main")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.eval().to(device), tokenizer


@contextlib.contextmanager
def told_in_a_line(name: str) -> Iterator[None]:
    """What transformers says when it cannot load something, in one line."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"model.base_model={name!r} cannot be loaded: {reason}. Write the Hub id or folder of a causal LM with "
            "its tokenizer."
        ) from error


def is_finished(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether [`finish`] was called in a folder.

    Raises:
        ValueError: it was with another identity.
    """
    file = folder / FINISHED
    if not file.exists():
        return False
    _check_identity(folder, read_finished(folder)["identity"], identity)
    return True


def begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Makes a folder and marks it as begun, so that work which was killed goes on with the same settings only.

    Raises:
        ValueError: it was begun with another identity.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / BEGUN
    if not file.exists():
        write_json_atomically(file, identity)
        return
    try:
        before = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Delete {folder}, and run the phase again.") from error
    _check_identity(folder, before, identity)


def finish(folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Marks what a folder holds as complete."""
    write_json_atomically(folder / FINISHED, {"identity": identity, "facts": facts})
    (folder / BEGUN).unlink(missing_ok=True)


def read_finished(folder: Path) -> dict[str, Any]:
    """What [`finish`] wrote: `identity` and `facts`.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content: dict[str, Any] = json.loads((folder / FINISHED).read_bytes())
        return {"identity": content["identity"], "facts": content["facts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FINISHED} is damaged ({error}). Delete it, and run the phase again.") from error


def _check_identity(folder: Path, before: dict[str, Any], identity: Mapping[str, Any]) -> None:
    if changed := differing(before, json.loads(json.dumps(identity))):
        raise ValueError(
            f"{folder} was made with other settings ({'; '.join(changed)}). Pass force=True (--force) to make it "
            "anew, or another folder below paths."
        )


def remove(*folders: Path) -> None:
    """Deletes folders that may not be there."""
    for folder in folders:
        if folder.exists():
            logger.info("deleting %s", folder)
            shutil.rmtree(folder)
