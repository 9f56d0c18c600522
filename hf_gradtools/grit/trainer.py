"""`GritTrainer`: a `Seq2SeqTrainer` for GRIT adapters on encoder-decoders and causal LMs."""

from __future__ import annotations

import math
import os
from typing import Any

from transformers import Seq2SeqTrainer
from transformers.modelcard import TrainingSummary

from hf_gradtools.grit.callback import GritCallback
from hf_gradtools.grit.card import write_grit_card
from hf_gradtools.grit.checks import find_tuner
from hf_gradtools.grit.controller import GritController
from hf_gradtools.hub import is_hub_id


CLIPS = ("before", "after")


class GritTrainer(Seq2SeqTrainer):
    """Trains a GRIT adapter, of an encoder-decoder or a causal LM.

    Args:
        *args: of [`~transformers.Seq2SeqTrainer`].
        clip: `"before"` clips the loss's gradient, as every Trainer does, and turns it afterwards (grafting
            keeps its norm); `"after"` clips what the preconditioner returns, as GRIT's paper does.
        **kwargs: of [`~transformers.Seq2SeqTrainer`]; a [`GritCallback`] among its callbacks is used as it is.

    Attributes:
        controller: the [`GritController`] of the current or last run.

    Raises:
        ValueError: `clip` is neither.
    """

    def __init__(self, *args: Any, clip: str = "before", **kwargs: Any):
        if clip not in CLIPS:
            raise ValueError(f"clip={clip!r} is unknown. Pass one of {', '.join(map(repr, CLIPS))}.")
        super().__init__(*args, **kwargs)
        self.clip = clip
        given = [x for x in self.callback_handler.callbacks if isinstance(x, GritCallback)]
        self._grit = given[0] if given else GritCallback()
        self._grit.set_trainer(self)
        if not given:
            self.add_callback(self._grit)
            self._grit.on_init_end(self.args, self.state, self.control, model=self.model)  # that event is over

    @property
    def controller(self) -> GritController | None:
        return self._grit.controller

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As [`~transformers.Trainer.train`]; a checkpoint outside `output_dir` is found too."""
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            resume_from_checkpoint = self._grit.resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._grit.resume_from_checkpoint = None
            self._grit.close()

    def _clip_grad_norm(self, model: Any) -> Any:
        controller = self.controller
        if self.clip == "after" and controller is not None and not controller.config.is_passive:
            if math.isfinite(controller.grad_norm()):
                controller.precondition(controller.grad_scale())  # clipping unscales what comes out of it
            else:
                controller.begin_step()  # the loss scaler will skip this step
        return super()._clip_grad_norm(model)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the adapter's ranks, settings and figures to `README.md` in `output_dir`; `push_to_hub` calls it.

        Args:
            language, license, tags, model_name, finetuned_from, dataset_tags, dataset: as in
                [`~transformers.Trainer.create_model_card`].
            tasks: the Hub's pipeline tag; default by the adapter's task type.
            dataset_args: not used: there is no table of metrics per dataset.
        """
        if not self.is_world_process_zero():
            return
        tuner = find_tuner(self.accelerator.unwrap_model(self.model))
        adapter = tuner.active_adapters[0]
        config = tuner.peft_config[adapter]
        base = finetuned_from or config.base_model_name_or_path
        # transformers looks up the base model's licence on the Hub; a folder may have the name of a model there.
        on_hub = base if is_hub_id(base) else None
        summary = TrainingSummary.from_trainer(
            self, language=language, license=license, tags=tags, model_name=model_name, finetuned_from=on_hub
        )
        write_grit_card(
            self.args.output_dir,
            tuner.rank_report(adapter) if self.controller is None else self.controller,
            self,
            config=config,
            model_name=model_name,
            tags=summary.tags,
            base_model=base,
            language=language,
            license=summary.license,
            datasets=dataset_tags or dataset,
            pipeline_tag=tasks if isinstance(tasks, str) or not tasks else tasks[0],
        )
