"""Scores of a model on the tasks of lm-evaluation-harness, through the harness's own `HFLM`."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hf_gradtools.nanogpt.data.tokenizers import character_ids
from hf_gradtools.nanogpt.sampling.generation import context_length


if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

__all__ = ["evaluate_tasks", "harness_model", "result_rows"]

logger = transformers_logging.get_logger(__name__)

KEPT = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
GENERATED_TOKENS = 256  # the harness's own default, where the context has room for it
# The last warns of right padding wherever a prompt ends with the token that also pads, though a mask tells them apart.
LOGGERS = ("lm_eval", "lm-eval", "transformers.generation.utils")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    block_size: int | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Scores a model on tasks.

    Args:
        model (`PreTrainedModel`): a causal LM.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; one without special tokens will do, and stays as it is.
        tasks (`Sequence[str]`): names of tasks or groups of the harness, or of `include_path`.
        include_path (`str`, *optional*): folder with task YAMLs of your own.
        batch_size (`int`, defaults to 8): rows in one forward.
        limit (`int`, *optional*): documents of each task, at most.
        block_size (`int`, *optional*): tokens of context, older ones are cut off; default what the model says.
        log_samples (`bool`, defaults to `False`): return each document's log-likelihoods, as `samples`.

    Returns:
        `dict[str, Any]`: the harness's `results` by task, with what they depend on; see [`result_rows`].

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no task, or a text cannot be scored.
    """
    was_training = model.training
    harness = harness_model(model, tokenizer, batch_size, block_size)  # which evaluates
    from lm_eval import simple_evaluate

    manager = _task_manager(tasks, include_path)
    try:
        with _quiet():
            found = simple_evaluate(
                model=harness,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                batch_size=batch_size,
                log_samples=log_samples,
            )
    finally:
        model.train(was_training)
    kept = (*KEPT, "samples") if log_samples else KEPT
    return {name: found[name] for name in kept if name in found}


def harness_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, block_size: int | None = None
) -> HFLM:
    """The harness's view of a model: an `HFLM` that also takes tokenizers without special tokens.

    Such a tokenizer has nothing to begin a text with and nothing to pad with, for which `HFLM` would add a token that
    the model has no embedding of. Here a text without context follows a newline, as in nanoGPT, or token 0 if there is
    none; padding is token 0, under a mask or where no result is read.

    Args:
        model (`PreTrainedModel`): a causal LM.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; a copy is made.
        batch_size (`int`, defaults to 8): rows in one forward.
        block_size (`int`, *optional*): tokens of context; default what the model says.

    Raises:
        ImportError: lm-eval is not installed.
    """
    base = _harness_class()

    class CausalLM(base):  # type: ignore[misc, valid-type]
        """An `HFLM` whose tokenizer may have no special tokens, and that says what it cannot score."""

        characters = character_ids(tokenizer)

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            if self.characters is not None and (unknown := sorted(set(string) - self.characters.keys())):
                raise ValueError(
                    f"a task has characters that the model does not know, {unknown} in {string[:60]!r}. "
                    "Choose tasks in its alphabet, or train it with the byte tokenizer."
                )
            return super().tok_encode(string, *args, **kwargs)

        def tok_decode(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            return None if tokens is None else super().tok_decode(tokens, *args, **kwargs)  # no end-of-text token

        def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
            if not self.tokenizer("")["input_ids"]:  # no text begins with a token of its own
                prefix = self.tokenizer.decode([self.prefix_token_id])
                strings = [string or prefix for string in strings]
            return super().tok_batch_encode(strings, *args, **kwargs)

        @property
        def max_gen_toks(self) -> int:
            return min(GENERATED_TOKENS, self.max_length // 2)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            for _, _, continuation in requests:
                if not 0 < len(continuation) <= self.max_length:
                    raise ValueError(
                        f"a task scores a text of {len(continuation)} tokens; the model takes 1 to {self.max_length}. "
                        "Choose tasks with shorter answers, or a model with a larger block_size."
                    )
            if cut := sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests):
                logger.warning(
                    f"{cut} of {len(requests)} texts are longer than the {self.max_length} tokens of the model's "
                    "context; what does not fit is cut off at their beginnings."
                )
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None and tokenizer.unk_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    with _quiet():
        return CausalLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=context_length(model, block_size),
            batch_size=batch_size,
            prefix_token_id=_prefix(tokenizer),
        )


def result_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task and metric: `task`, `metric`, `filter`, `value`, `stderr`, `n_shot`, `version`."""
    rows = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "value": value if isinstance(value, (str, int)) else float(value),
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "n_shot": results.get("n-shot", {}).get(task),
                    "version": results.get("versions", {}).get(task),
                }
            )
    return rows


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token before a text without context, where the tokenizer names none."""
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return None
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[newline] for newline in ("\n", "Ċ") if newline in vocabulary), 0)


def _harness_class() -> type[HFLM]:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("lm_eval_tasks needs lm-evaluation-harness: pip install 'hf_gradtools[eval]'") from error
    return HFLM


def _task_manager(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> TaskManager:
    """Knows the tasks of `include_path` and, only if they are asked for, the thousands of the harness."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise ValueError("lm_eval_tasks is empty; pass names of tasks, separated by commas.")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"lm_eval_include_path={str(include_path)!r} is no folder; pass the one with your YAMLs.")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if not _unknown(own, tasks):
            return own
    every = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := _unknown(every, tasks):
        raise ValueError(
            f"lm_eval_tasks: there is no task {', '.join(unknown)}. `lm-eval ls tasks` lists those of the harness; "
            "pass lm_eval_include_path= the folder of your own."
        )
    return every


def _unknown(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the harness's remarks on models passed as objects; what goes wrong is raised anyway."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
