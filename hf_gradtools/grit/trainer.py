"""`GritTrainer`: a `Seq2SeqTrainer` for GRIT adapters on encoder-decoders and causal LMs."""

from __future__ import annotations

from typing import Any

from transformers import Seq2SeqTrainer

from hf_gradtools.grit.callback import GritCallback
from hf_gradtools.grit.controller import GritController


CLIPS = ("before", "after")


class GritTrainer(Seq2SeqTrainer):
    """Trains a GRIT adapter, of an encoder-decoder or a causal LM.

    Args:
        *args, clip: `"before"` clips the loss's gradient, as every Trainer does, and turns it afterwards (grafting
            keeps its norm); `"after"` clips what the preconditioner returns, as GRIT's paper does.
        **kwargs: of [`~transformers.Seq2SeqTrainer`].

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
        self._grit = GritCallback(self)
        self.add_callback(self._grit)

    @property
    def controller(self) -> GritController | None:
        return self._grit.controller

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`]; a checkpoint outside `output_dir` is found too."""
        self._grit.resume_from_checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._grit.close()

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.clip == "after" and self.controller is not None and not self.controller.config.is_passive:
            self.controller.precondition()
        return super()._clip_grad_norm(model)
