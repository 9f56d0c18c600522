"""Checkpoints of learners: one file for each hookpoint and step, so that hookpoints can be trained apart or together.

    <output_dir>/checkpoints/<hookpoint>/step-00000500.safetensors
    <output_dir>/<hookpoint>/cfg.json, sae_weights.safetensors      once it is finished

A kill may come between two files of one step, so the last two steps of each hookpoint stay, and a resumed run begins
at the newest that all have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.sae.learner import Learner
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.saving import refresh_card, write_pairs
from hf_gradtools.sae.training_config import differing


__all__ = ["LearnerCheckpoints"]

FOLDER = "checkpoints"
FINISHED = "finished.json"
Identity = Callable[[str], dict[str, Any]]


class LearnerCheckpoints:
    """The checkpoints in a folder.

    Args:
        output_dir (`Path`): of the training.
        writes (`bool`): whether this process writes them.
    """

    def __init__(self, output_dir: Path, writes: bool = True):
        self.output_dir, self.writes = output_dir, writes

    def save(self, learners: Mapping[str, Learner], step: int, identity: Identity) -> None:
        """Writes the state of each learner, and keeps the last two of each alone."""
        if not self.writes:
            return
        for name, learner in learners.items():
            learner.save(self._file(name, step), identity(name))
        for name in learners:
            steps = sorted(self._steps(name))
            kept = [done for done in steps if done <= step][-2:]
            for other in set(steps).difference(kept):  # also later ones, of a run that went on without the others
                self._file(name, other).unlink(missing_ok=True)

    def load_newest(self, learners: Mapping[str, Learner], identity: Identity) -> int:
        """Puts all learners into the newest state that all have; returns its step, 0 if there is none."""
        common = set.intersection(*(set(self._steps(name)) for name in learners))
        if not common:
            return 0
        step = max(common)
        for name, learner in learners.items():
            learner.load(self._file(name, step), identity(name))
        return step

    def finish(self, hookpoint: str, sae: SAE, identity: Identity) -> None:
        """Writes a finished autoencoder, and removes its checkpoints."""
        if not self.writes:
            return
        write_pairs([sae], self.output_dir)
        self._folder(hookpoint).mkdir(parents=True, exist_ok=True)
        write_json_atomically(self._folder(hookpoint) / FINISHED, identity(hookpoint))
        self._remove_steps(hookpoint)

    def write_card(self) -> None:
        """Writes the card of all finished autoencoders; for one process, once they are there."""
        refresh_card(self.output_dir)

    def finished(self, hookpoints: Iterable[str], identity: Identity) -> dict[str, SAE]:
        """The autoencoders that an earlier run finished.

        Raises:
            ValueError: it was another training.
        """
        done = [name for name in hookpoints if (self._folder(name) / FINISHED).exists()]
        for name in done:
            before = json.loads((self._folder(name) / FINISHED).read_bytes())
            now = json.loads(json.dumps(identity(name)))
            if changed := differing(before, now):
                raise ValueError(
                    f"output_dir={str(self.output_dir)!r} holds a finished {name} that was trained with "
                    f"{'; '.join(changed)}. Pass the same options, or another folder."
                )
            if self.writes:  # a kill may have come before they were removed
                self._remove_steps(name)
        return {name: SAE.from_pretrained(self.output_dir, name) for name in done}

    def refuse_any(self, hookpoints: Iterable[str]) -> None:
        """ValueError if an earlier run left something that a new one would overwrite."""
        for name in hookpoints:
            if self._steps(name) or (self._folder(name) / FINISHED).exists():
                raise ValueError(
                    f"output_dir={str(self.output_dir)!r} holds an earlier training of {name}. "
                    "Pass resume=True to go on with it, or another folder."
                )

    def _remove_steps(self, hookpoint: str) -> None:
        for step in self._steps(hookpoint):
            self._file(hookpoint, step).unlink(missing_ok=True)

    def _folder(self, hookpoint: str) -> Path:
        return self.output_dir / FOLDER / hookpoint

    def _file(self, hookpoint: str, step: int) -> Path:
        return self._folder(hookpoint) / f"step-{step:08d}.safetensors"

    def _steps(self, hookpoint: str) -> list[int]:
        return [int(file.stem.removeprefix("step-")) for file in self._folder(hookpoint).glob("step-*.safetensors")]
