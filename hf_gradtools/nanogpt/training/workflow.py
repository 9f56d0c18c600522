"""The workflow of `hf-gradtools nanogpt train`.

```python
result = train(TrainOptions(dataset="shakespeare_char", out_dir="out", max_iters=1000), {"n_layer": 4, "n_embd": 128})
result.best_val_loss
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.hub import CARD_FILE
from hf_gradtools.nanogpt.data.token_folder import TokenFolder
from hf_gradtools.nanogpt.training.arguments import training_arguments
from hf_gradtools.nanogpt.training.card import write_nanogpt_card
from hf_gradtools.nanogpt.training.memory import peak_memory_mb, reset_peak_memory
from hf_gradtools.nanogpt.training.options import TrainOptions
from hf_gradtools.nanogpt.training.samples import sample_start
from hf_gradtools.nanogpt.training.starting import RESUME, build_model
from hf_gradtools.nanogpt.training.trainer import FIGURES, BlockTrainer
from hf_gradtools.workflow.checkpoints import (
    checkpoint_folder,
    checkpoint_iteration,
    last_checkpoint,
    prune,
    publish,
)


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig

__all__ = ["TrainResult", "stored_options", "train"]

logger = logging.get_logger(__name__)

RUN, DATA = "run.json", "data"
MODEL_FILES = ("config.json", "model*.safetensors", "pytorch_model*.bin", "*.pt")
MEASURED = ("iter_latency_ms", "peak_memory_mb")  # of a process, not of the run's state


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        best_val_loss, best_val_iter: the best evaluation, whose model is in `out_dir`.
        val_loss, train_loss: the last ones; `train_loss` is a mean since the log entry before it, and None if the run
            only evaluated.
        iters: iterations done, those of interrupted runs included.
        num_params: parameters, tied ones counted once.
        better_than_chance: how many times likelier the best model makes a token than chance does.
        iter_latency_ms: mean time of an iteration of this process, evaluations left out; None if it did none.
        peak_memory_mb: MiB, of the accelerator, or of this process.
        out_dir: the folder.
    """

    best_val_loss: float
    best_val_iter: int
    val_loss: float
    train_loss: float | None
    iters: int
    num_params: int
    better_than_chance: float
    iter_latency_ms: float | None
    peak_memory_mb: float
    out_dir: str


def train(
    options: TrainOptions,
    model_config: NanoGPTConfig | Mapping[str, Any] | None = None,
    *,
    echo: Callable[[str], None] | None = None,
) -> TrainResult:
    """Trains a model, or goes on with a run that was interrupted.

    `out_dir` then holds the model of the best evaluation as `AutoModelForCausalLM` and `AutoTokenizer` load it, its
    card, and the checkpoints of the best and the last evaluation. A run that is killed at any moment and goes on with
    `init_from="resume"` gives the losses of one that was never interrupted.

    Args:
        options (`TrainOptions`): the run.
        model_config (`NanoGPTConfig` or mapping, *optional*): the model, see [`build_model`]; of a mapping,
            `vocab_size` is that of the data.
        echo (`Callable`, *optional*): takes a line on each evaluation, and samples; default the log.

    Raises:
        ValueError: an option does not fit the data, the model, or what is in `out_dir`.
        FloatingPointError: the loss became infinite or NaN.
    """
    out_dir = Path(options.out_dir)
    data = TokenFolder(options.dataset, options.data_dtype)
    data.check_ids()
    checkpoint = _checkpoint_to_resume(options, data, out_dir)
    if options.sample_each_eval:
        sample_start(data, options)  # says now if there is none
    arguments = training_arguments(options, resumed=checkpoint is not None)
    set_seed(options.seed)
    resumed = checkpoint is not None
    model = build_model(str(checkpoint) if resumed else options.init_from, model_config, data, resumed=resumed)
    block_size = _block_size(model, model_config, out_dir if checkpoint is not None else None)
    trainer = BlockTrainer(model, arguments, options, data, block_size, echo or logger.info)
    trainer.remove_callback(PrinterCallback)
    reset_peak_memory(arguments.device)
    if options.eval_only:
        trainer.state.global_step = 0 if checkpoint is None else checkpoint_iteration(checkpoint)
        trainer.evaluate()
        return _result(trainer)
    _begin(trainer, out_dir, block_size, checkpoint)
    measured = None
    if _is_finished(trainer, checkpoint):
        measured = _measured_before(out_dir)
    else:
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            trainer.display.close()
    result = _result(trainer, measured)
    if trainer.is_world_process_zero():
        _finish(trainer, out_dir, result)
    return result


def _checkpoint_to_resume(options: TrainOptions, data: TokenFolder, out_dir: Path) -> Path | None:
    """The checkpoint to go on from; ValueError if there is none, or there should be none."""
    checkpoint = last_checkpoint(out_dir)
    if options.init_from == RESUME:
        if checkpoint is None:
            raise ValueError(
                f"out_dir={options.out_dir!r} holds no checkpoint to continue. Start a run without init_from=resume."
            )
        _check_same(options, data, _begun(out_dir))
        return checkpoint
    if checkpoint is not None and not options.overwrite_out_dir and not options.eval_only:
        raise ValueError(
            f"out_dir={options.out_dir!r} holds the checkpoints of an earlier run. Continue it by init_from=resume, "
            "pass another folder, or overwrite_out_dir=True to remove them."
        )
    if not options.overwrite_out_dir and not options.eval_only:
        for pattern in (*MODEL_FILES, FIGURES, CARD_FILE):
            if there := sorted(path.name for path in out_dir.glob(pattern)):
                raise ValueError(
                    f"out_dir={options.out_dir!r} holds {there[0]}, which the run would replace. Pass another folder, "
                    "or overwrite_out_dir=True."
                )
    return None


def stored_options(out_dir: Path) -> dict[str, Any]:
    """The options with which the run in a folder was begun, or last resumed.

    Raises:
        ValueError: there is no run.
    """
    return _begun(out_dir)["options"]


def _begun(out_dir: Path) -> dict[str, Any]:
    if not (out_dir / RUN).is_file():
        raise ValueError(f"out_dir={str(out_dir)!r} holds no {RUN}. Start a run without init_from=resume.")
    return json.loads((out_dir / RUN).read_bytes())


def _check_same(options: TrainOptions, data: TokenFolder, begun: dict[str, Any]) -> None:
    before, now = TrainOptions(**begun["options"]).identity(), options.identity()
    if changed := [f"{name}={before[name]!r}, not {now[name]!r}" for name in before if before[name] != now[name]]:
        raise ValueError(
            f"out_dir={options.out_dir!r} was begun with {'; '.join(changed)}. Resume with the same options."
        )
    if begun[DATA] != data.fingerprint():
        raise ValueError(
            f"out_dir={options.out_dir!r} was begun with other data than is in {data.path} now. Start a run without "
            "init_from=resume, or restore the data."
        )


def _block_size(model: PreTrainedModel, given: NanoGPTConfig | Mapping[str, Any] | None, resumed: Path | None) -> int:
    """Tokens in a block: what is asked for, else what the run was begun with, else what the model was made for."""
    asked = given.get("block_size") if isinstance(given, Mapping) else getattr(given, "block_size", None)
    if resumed is not None:
        begun = int(_begun(resumed)["block_size"])
        if asked not in (None, begun):
            raise ValueError(f"out_dir={str(resumed)!r} was begun with block_size={begun}, not {asked}.")
        return begun
    made_for = asked or getattr(model.config, "block_size", None) or model.config.max_position_embeddings
    return int(made_for)


def _begin(trainer: BlockTrainer, out_dir: Path, block_size: int, checkpoint: Path | None) -> None:
    if trainer.is_world_process_zero():
        run = {"options": asdict(trainer.options), "block_size": block_size, DATA: trainer.data.fingerprint()}
        if checkpoint is None:
            out_dir.mkdir(parents=True, exist_ok=True)
            prune(out_dir, ())
            for name in (FIGURES, TRAINER_STATE_NAME, CARD_FILE):  # of the run that was there
                (out_dir / name).unlink(missing_ok=True)
        else:  # what it may change counts for those that resume it again
            run["options"]["init_from"] = stored_options(out_dir)["init_from"]
        write_json_atomically(out_dir / RUN, run)
    trainer.accelerator.wait_for_everyone()


def _is_finished(trainer: BlockTrainer, checkpoint: Path | None) -> bool:
    """Whether the checkpoint is the last one of the run, which then has nothing left to do."""
    if checkpoint is None:
        return False
    state = type(trainer.state).load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    begun, trainer.state = trainer.state, state
    if state.global_step >= trainer.options.max_iters or trainer.patience_is_over():
        return True
    trainer.state = begun
    return False


def _measured_before(out_dir: Path) -> dict[str, float] | None:
    """What the process that finished a run measured, if it came to tell."""
    if not (out_dir / FIGURES).is_file():
        return None
    figures = json.loads((out_dir / FIGURES).read_bytes())
    return {name: figures[name] for name in MEASURED} if all(name in figures for name in MEASURED) else None


def _result(trainer: BlockTrainer, measured: dict[str, float] | None = None) -> TrainResult:
    figures = trainer.figures()
    if measured is None:
        latency, memory = trainer.pace.iter_latency_ms, peak_memory_mb(trainer.args.device)
    else:
        latency, memory = (measured[name] for name in MEASURED)
    return TrainResult(
        best_val_loss=figures["best_val_loss"],
        best_val_iter=figures["best_val_iter"],
        val_loss=figures["val_loss"],
        train_loss=figures["train_loss"],
        iters=figures["iter"],
        num_params=figures["num_params"],
        better_than_chance=figures["better_than_chance"],
        iter_latency_ms=latency,
        peak_memory_mb=memory,
        out_dir=trainer.options.out_dir,
    )


def _finish(trainer: BlockTrainer, out_dir: Path, result: TrainResult) -> None:
    """The figures; and the best model and its card, also if the run was killed before it had copied them."""
    best = checkpoint_folder(out_dir, result.best_val_iter)
    if best.is_dir():  # there is none of a run without checkpoints
        publish(best, out_dir)
        write_nanogpt_card(out_dir, trainer, result)
    measured = {name: getattr(result, name) for name in MEASURED}
    write_json_atomically(out_dir / FIGURES, {**trainer.figures(), **measured})
    trainer.state.save_to_json(str(out_dir / TRAINER_STATE_NAME))
