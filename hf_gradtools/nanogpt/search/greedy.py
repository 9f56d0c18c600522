"""Greedy search: round by round, the step with the best gain per cost becomes part of the configuration.

The search is a function of what its runs measured. Started again, it takes the same path from the recorded runs, and
runs only what is missing: the rest of the round that was interrupted.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.nanogpt.search.candidates import (
    DIRECTIONS,
    DUPLICATIONS,
    MIDDLE,
    UP,
    Candidate,
    candidates,
    check_parameters,
)
from hf_gradtools.nanogpt.search.choosing import Choice, Comparison, choose, compare
from hf_gradtools.nanogpt.search.costs import HARDWARE_COSTS, TARGETS, ReportFn
from hf_gradtools.nanogpt.search.evaluating import Evaluated, Evaluator
from hf_gradtools.nanogpt.search.pool import Pool
from hf_gradtools.nanogpt.search.reading import GrammarError, as_yaml, config_key, read_documents


__all__ = ["SearchSettings", "greedy_search"]

logger = logging.get_logger(__name__)

MAX_ITERS = "max_iters"
NOTHING_PAYS, ROUNDS_DONE = "no_positive_efficiency", "num_iterations"


@dataclass(frozen=True)
class SearchSettings:
    """What a greedy search varies and by what it chooses.

    Args:
        increments (`dict[str, float]`): by parameter.
        iterations (`int`, defaults to 1): multiples of an increment that a round tries.
        random_iterations (`int`, defaults to 1): seeds for each configuration, from its own `seed` on.
        efficiency_target (`str`, defaults to `"params"`): the cost: "params", "vram" or "iter" as a run measured it;
            "macs", "exp" or "kv_bytes" of a token from the hardware report.
        direction (`str`, defaults to `"up"`): "up" adds increments, "down" subtracts them, "both" does both.
        noise_guard (`float`, defaults to 1): with several seeds, standard errors that a gain must exceed.
        nlayer_dup_mode (`str`, defaults to `"dup_middle"`): which layer another one is a copy of, or "dup_each".
        max_iters_increase (`int`, *optional*): longer training where no candidate is accepted, instead of the end.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    increments: dict[str, float]
    iterations: int = 1
    random_iterations: int = 1
    efficiency_target: str = "params"
    direction: str = UP
    noise_guard: float = 1.0
    nlayer_dup_mode: str = MIDDLE
    max_iters_increase: int | None = None

    def __post_init__(self) -> None:
        if not self.increments or not all(step and math.isfinite(step) for step in self.increments.values()):
            raise ValueError(
                f"increments={list(self.increments.values())}; pass a finite one for each parameter, none of them 0."
            )
        for name, smallest in {
            "iterations": 1,
            "random_iterations": 1,
            "noise_guard": 0,
            "max_iters_increase": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}.")
        choices = {"efficiency_target": TARGETS, "direction": DIRECTIONS, "nlayer_dup_mode": DUPLICATIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Pass one of {', '.join(known)}.")


@dataclass
class _Round:
    """What the results file says of a round; round -1 is the baseline alone."""

    number: int
    baseline: Evaluated
    tried: Sequence[Evaluated] = ()
    comparisons: Sequence[Comparison | None] = ()
    choice: Choice | None = None
    action: str | None = None
    config_after: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        entries = [one.candidate_document(other) for one, other in zip(self.tried, self.comparisons, strict=True)]
        document: dict[str, Any] = {"iter": self.number, "baseline_metrics": self.baseline.metrics_document()}
        if self.number >= 0:
            document["candidates"] = entries
            document["chosen"] = (
                None if self.choice is None else {**entries[self.choice.index], "rule": self.choice.rule}
            )
        if self.action is not None:
            document["action"] = self.action
        return {**document, "baseline_config_after": self.config_after}


def greedy_search(
    baseline: Mapping[str, Any],
    settings: SearchSettings,
    pool: Pool,
    *,
    num_iterations: int = 1,
    results_file: str | Path = "sweep_log.yaml",
    report: ReportFn | None = None,
    layer_lists: Iterable[str] = (),
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Improves a configuration by small steps, each the best gain of e^-loss for what it costs.

    A candidate that fails is recorded and left out. The search ends with the first round that accepts none.

    Args:
        baseline (`Mapping[str, Any]`): flags to begin with.
        settings (`SearchSettings`): what is varied.
        pool (`Pool`): runs configurations.
        num_iterations (`int`, defaults to 1): the most rounds.
        results_file (`str` or `Path`): YAML, written whole after each round.
        report (`ReportFn`, *optional*): for the costs that are not measured.
        layer_lists (`Iterable[str]`): flags whose lists are of layers.
        retry_failed (`bool`, defaults to `False`): candidates that failed are run again.

    Returns:
        `dict`: as in `results_file`: `settings`, `iterations`, `baseline_config` (the best one), `stop_reason`.

    Raises:
        ValueError: a parameter cannot be varied, or `results_file` holds another search.
        RuntimeError: the baseline itself failed.
    """
    check_parameters(baseline, settings.increments)
    if settings.max_iters_increase is not None and MAX_ITERS not in baseline:
        raise ValueError(f"max_iters_increase={settings.max_iters_increase} needs max_iters in orig_settings.")
    if settings.efficiency_target in HARDWARE_COSTS and report is None:
        raise ValueError(
            f"efficiency_target={settings.efficiency_target!r} needs report=, a hardware report of flags."
        )
    about = {"baseline": dict(baseline), **asdict(settings)}
    record = _Record(Path(results_file), about)
    record.check()
    group = config_key(about)
    evaluator = Evaluator(pool, settings.efficiency_target, settings.random_iterations, report, group, retry_failed)
    config, layer_lists = dict(baseline), tuple(layer_lists)
    base = evaluator.baseline(config)
    record.add(_Round(-1, base, config_after=config))
    for number in range(num_iterations):
        tried = evaluator.round(number, _candidates(config, settings, layer_lists))
        comparisons = [each.measured and compare(base.measured, each.measured, settings.noise_guard) for each in tried]
        choice, action = choose(comparisons), None
        if choice is not None:
            base, config = tried[choice.index], tried[choice.index].candidate.config
            logger.info(f"round {number}: {base.candidate.param} = {base.candidate.value} ({choice.rule})")
        elif settings.max_iters_increase is not None:
            config = {**config, MAX_ITERS: config[MAX_ITERS] + settings.max_iters_increase}
            action = f"max_iters_increased_to_{config[MAX_ITERS]}"
            base = evaluator.baseline(config)  # what is trained longer is compared with what is, too
        record.add(_Round(number, base, tried, comparisons, choice, action, config))
        if choice is None and action is None:
            return record.end(NOTHING_PAYS)
    return record.end(ROUNDS_DONE)


def _candidates(config: dict[str, Any], settings: SearchSettings, layer_lists: tuple[str, ...]) -> list[Candidate]:
    return candidates(
        config,
        settings.increments,
        settings.iterations,
        direction=settings.direction,
        nlayer_dup_mode=settings.nlayer_dup_mode,
        layer_lists=layer_lists,
    )


class _Record:
    """The results file, written whole after each round."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about
        self.rounds: list[_Round] = []

    def check(self) -> None:
        """ValueError if there is a file of another search."""
        if not self.path.exists():
            return
        try:
            (found,) = read_documents(self.path)
            same = found["settings"] == json.loads(json.dumps(self.about))
        except (GrammarError, KeyError, TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(
                f"results_file={str(self.path)!r} holds a search with other settings. Pass another results_file, or "
                "the settings that stand in it."
            )

    def add(self, finished: _Round) -> None:
        self.rounds.append(finished)
        self._write({})

    def end(self, stop_reason: str) -> dict[str, Any]:
        return self._write({"stop_reason": stop_reason})

    def _write(self, more: dict[str, Any]) -> dict[str, Any]:
        log = {
            "settings": self.about,
            "baseline_config": self.rounds[-1].config_after,
            "iterations": [each.document() for each in self.rounds],
            **more,
        }
        log = json.loads(json.dumps(log))  # a copy: no anchors in the YAML where two rounds share a configuration
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Of its own name: other machines that take part write the same file.
        with atomic_write(self.path, tmp_suffix=f".{uuid.uuid4().hex}.tmp") as file:
            file.write(as_yaml(log).encode())
        return log
