"""The workflow of `hf-gradtools gradmem train`.

```python
result = train(TrainOptions("out/n2", base_model="llama", data_path="N2-K1V1-V4", max_steps=1000))
result["metrics"]["exact_match"]
```
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.gradmem.kv_retrieval import GradMemCollator, PromptCollator
from hf_gradtools.gradmem.training.arguments import training_arguments
from hf_gradtools.gradmem.training.card import write_gradmem_card
from hf_gradtools.gradmem.training.evaluation import evaluate_rows, ignored_ids, with_wrong_contexts
from hf_gradtools.gradmem.training.options import TrainOptions
from hf_gradtools.gradmem.training.progress import best_evaluation, evaluations
from hf_gradtools.gradmem.training.results import RESULTS
from hf_gradtools.gradmem.training.stages import Stage, build_stages, seen_contexts
from hf_gradtools.gradmem.training.starting import build_model, build_tokenizer, load_trained, loading_options
from hf_gradtools.gradmem.training.trainer import GradMemTrainer
from hf_gradtools.hub import CARD_FILE
from hf_gradtools.workflow.checkpoints import checkpoint_folder, last_checkpoint, publish
from hf_gradtools.workflow.display import Display
from hf_gradtools.workflow.run import OPTIONS, check_same_options


__all__ = ["train"]

logger = logging.get_logger(__name__)

MODEL_FILES = ("config.json", "model*.safetensors", RESULTS, CARD_FILE)


class _Accuracy(Display):
    def describe(self, state: TrainerState, logs: dict[str, Any]) -> str:
        losses = [value for name, value in logs.items() if name.startswith("eval_inner_loss_")]
        inner = f", inner loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""
        train = "" if self.train_loss is None else f", train loss {self.train_loss:.4f}"
        return f"step {state.global_step}: exact match {logs['eval_exact_match']:.3f}{train}{inner}"


def train(options: TrainOptions, *, echo: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Trains a model on key-value retrieval, or goes on with a run that was interrupted.

    `exp_path` then holds the model of the best evaluation as `AutoModelForCausalLM` and `AutoTokenizer` load it, its
    card, `results.json`, and the checkpoints of the best and the last evaluation. A run that is killed at any moment
    and goes on with `resume` gives, bit by bit, what it would have given.

    Args:
        options ([`TrainOptions`]): the run.
        echo (`Callable`, *optional*): takes a line on each evaluation; default the log.

    Returns:
        `dict`: what is in `results.json`: the best model's `metrics` on the validation rows (see
        [`~hf_gradtools.gradmem.training.evaluation.evaluate_batches`]); `wrong_context_exact_match`, the same with
        each row's context taken from another row, which should be near `chance`; `seen_contexts`, the share of
        validation contexts that training had seen; the curriculum's `stages`; and what was trained how.

    Raises:
        ValueError: an option does not fit the data, the model, or what is in `exp_path`.
    """
    folder = Path(options.exp_path)
    checkpoint = _checkpoint_to_resume(options, folder)
    stages = build_stages(options)
    tokenizer = build_tokenizer(options, stages[0].alphabet)
    set_seed(options.seed)
    model = build_model(options, tokenizer, checkpoint)
    display = _Accuracy(options.progress, echo or logger.info)
    trainer = _build_trainer(options, model, stages, tokenizer, checkpoint, display)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / OPTIONS, options.identity())
    trainer.accelerator.wait_for_everyone()
    begun = time.process_time()
    if not _is_finished(trainer, checkpoint):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            display.close()
    seconds = None if checkpoint is not None else time.process_time() - begun
    result: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        result = _finish(trainer, options, folder, seconds)
    trainer.accelerator.wait_for_everyone()
    return result


def _checkpoint_to_resume(options: TrainOptions, folder: Path) -> Path | None:
    """The checkpoint to go on from; ValueError if there is no run, or there should be none."""
    checkpoint = last_checkpoint(folder)
    if options.resume:
        check_same_options(options, "exp_path")
        if checkpoint is None:
            logger.warning(f"exp_path={options.exp_path!r} holds no checkpoint yet; the run begins anew")
        return checkpoint
    there = [checkpoint] if checkpoint else [path for pattern in MODEL_FILES for path in folder.glob(pattern)]
    if there:
        raise ValueError(
            f"exp_path={options.exp_path!r} holds {there[0].name} of an earlier run. Continue it by resume=True, or "
            "pass another folder."
        )
    return None


def _build_trainer(
    options: TrainOptions,
    model: Any,
    stages: list[Stage],
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    display: Display,
) -> GradMemTrainer:
    collator = PromptCollator if options.vanilla else GradMemCollator
    make = partial(collator, tokenizer, max_context_length=options.max_context_length)
    trainer = GradMemTrainer(
        model,
        training_arguments(options, resumed=checkpoint is not None),
        stages=stages,
        data_collator=make(queries_per_context=options.queries_per_context),
        eval_collator=make(),
        processing_class=tokenizer,
        inner_lr_multiplier=options.inner_lr_multiplier,
        final_lr_ratio=options.final_lr_ratio,
        ignored_ids=ignored_ids(tokenizer),
        eval_K=options.eval_K,
        eval_generation=options.eval_generation,
        curriculum_threshold=options.curriculum_threshold,
        stop_at=options.stop_at,
        patience=options.early_stopping_patience,
        callbacks=[display],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _is_finished(trainer: GradMemTrainer, checkpoint: Path | None) -> bool:
    """Whether the checkpoint is the last one of the run, which then has nothing left to do."""
    if checkpoint is None:
        return False
    begun, trainer.state = trainer.state, TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if trainer.state.global_step >= trainer.args.max_steps or trainer.is_over:
        return True
    trainer.state = begun
    return False


def _finish(trainer: GradMemTrainer, options: TrainOptions, folder: Path, seconds: float | None) -> dict[str, Any]:
    """Evaluates the best model once more, and writes the figures and the card beside it."""
    state = trainer.state
    best = best_evaluation(state.log_history)
    publish(checkpoint_folder(folder, best["step"]), folder)  # also if the run was killed before it had
    model = load_trained(folder, **loading_options(options)).to(trainer.args.device)
    stage = trainer.stages[best["eval_stage"]]
    result = {
        **_described(options, stage),
        **_measured(trainer, options, model, stage),
        "best_step": best["step"],
        "steps": state.global_step,
        "stages": _stage_figures(trainer),
        "cpu_seconds": seconds,
        "num_params": model.num_parameters(),
        "options": asdict(options),
    }
    write_json_atomically(folder / RESULTS, result)
    state.save_to_json(str(folder / TRAINER_STATE_NAME))
    write_gradmem_card(folder, model, result, state.log_history)
    return result


def _described(options: TrainOptions, stage: Stage) -> dict[str, Any]:
    """What tables call the run."""
    K = options.K if options.eval_K is None else options.eval_K
    return {
        "task": stage.name,
        "num_pairs": stage.num_pairs,
        "vanilla": options.vanilla,
        "grad_mode": None if options.vanilla else options.grad_mode,
        "K": None if options.vanilla else K,
        "seed": options.seed,
        "chance": stage.chance,
    }


def _measured(trainer: GradMemTrainer, options: TrainOptions, model: Any, stage: Stage) -> dict[str, Any]:
    """How good a model is on the validation rows, and what else these figures may come from."""
    evaluate = partial(
        evaluate_rows,
        model,
        collator=trainer.eval_collator,
        batch_size=options.per_device_batch_size,
        ignored_ids=trainer.ignored_ids,
        K=options.eval_K,
    )
    args = trainer.args
    rows = trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "metrics": evaluate(stage.valid),
        "wrong_context_exact_match": evaluate(with_wrong_contexts(stage.valid), generation=False)["exact_match"],
        "seen_contexts": seen_contexts(stage, rows) if len(trainer.stages) == 1 else None,
    }


def _stage_figures(trainer: GradMemTrainer) -> list[dict[str, Any]]:
    """Of each stage that was reached: the last step in it, and the last and the best exact match."""
    figures = []
    for number, stage in enumerate(trainer.stages):
        if rows := [row for row in evaluations(trainer.state.log_history) if row["eval_stage"] == number]:
            scores = [row["eval_exact_match"] for row in rows]
            figures.append(
                {"task": stage.name, "last_step": rows[-1]["step"], "exact_match": scores[-1], "best": max(scores)}
            )
    return figures
