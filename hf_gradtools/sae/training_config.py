"""How sparse autoencoders are trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


__all__ = ["SAETrainingConfig", "differing"]

PARALLEL = ("layers", "data")
SCHEDULES = ("linear", "constant")
INITS = ("data", "random")


@dataclass
class SAETrainingConfig:
    """How sparse autoencoders are trained; each of several by itself, so that it comes out as if trained alone.

    Args:
        output_dir (`str`): where checkpoints and the finished autoencoders go.
        batch_tokens (`int`, defaults to 2048): tokens of an optimizer step, over all processes.
        epochs (`int`, defaults to 1): passes over the activations.
        max_steps (`int`, *optional*): steps at most.
        learning_rate (`float`, *optional*): of Adam, at its peak; less for many more features or a long training. By
            default 4e-3 at 2048 tokens a step, and for others in proportion to the root of `batch_tokens`.
        adam_beta1, adam_beta2 (`float`): of Adam's moments.
        lr_scheduler_type (`str`, defaults to `"linear"`): falls to zero from `decay_start` on, or is `"constant"`.
        warmup_fraction (`float`, defaults to 0.05): share of the steps in which the learning rate rises.
        decay_start (`float`, defaults to 0.1): share of the steps after which it falls.
        k_start (`int`, *optional*): active features of a token at first, for `"topk"` and `"batchtopk"`; falls
            to `k`.
        k_annealing_fraction (`float`, defaults to 0.1): share of the steps in which it does.
        sparsity_warmup_fraction (`float`, defaults to 0.1): share of the steps in which a sparsity penalty rises.
        max_grad_norm (`float`, *optional*): clips each autoencoder's gradient.
        dead_after_tokens (`int`, defaults to 1_000_000): a feature that was not active for so many is dead, and gets
            the loss that revives it.
        normalize_input (`bool`, defaults to `True`): whether it trains on inputs of unit variance; the factor is
            folded into the weights when they are saved.
        decoder_init (`str`, defaults to `"data"`): features begin as directions of hidden states from the median, or
            `"random"`; either way the encoder is scaled so that the first reconstructions have the right length.
        outlier_ratio (`float`, *optional*, defaults to 10): hidden states farther from the median than so many times
            the median distance ("massive activations", one token in ten thousand with most of the variance) count as
            the median, and teach nothing. `None` keeps them.
        calibration_tokens (`int`, defaults to 16384): tokens of which all that is taken.
        buffer_tokens (`int`, defaults to 131072): tokens shuffled together.
        bf16 (`bool`, defaults to `False`): matrix products in bfloat16; weights and their moments stay float32.
        seed (`int`, defaults to 0): of weights and the order of tokens.
        parallel (`str`, defaults to `"layers"`): what several processes share out: the autoencoders, or each batch.
        logging_steps (`int`, defaults to 50): steps between log entries.
        save_steps (`int`, defaults to 500): steps between checkpoints.
        report_to (`str`, defaults to `"none"`): trackers, as accelerate names them: `"tensorboard"`, `"wandb"`, …
        use_cpu (`bool`, defaults to `False`): whether to leave an accelerator alone.

    Raises:
        ValueError: a value is impossible.
    """

    # What a resumed run may change.
    free: ClassVar[set[str]] = {"output_dir", "logging_steps", "save_steps", "report_to", "use_cpu", "parallel"}

    output_dir: str
    batch_tokens: int = 2048
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    lr_scheduler_type: str = "linear"
    warmup_fraction: float = 0.05
    decay_start: float = 0.1
    k_start: int | None = None
    k_annealing_fraction: float = 0.1
    sparsity_warmup_fraction: float = 0.1
    max_grad_norm: float | None = None
    dead_after_tokens: int = 1_000_000
    normalize_input: bool = True
    decoder_init: str = "data"
    outlier_ratio: float | None = 10.0
    calibration_tokens: int = 16_384
    buffer_tokens: int = 131_072
    bf16: bool = False
    seed: int = 0
    parallel: str = "layers"
    logging_steps: int = 50
    save_steps: int = 500
    report_to: str = "none"
    use_cpu: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.batch_tokens > 0:
            self.learning_rate = round(4e-3 * (self.batch_tokens / 2048) ** 0.5, 6)
        least = {
            **dict.fromkeys(("batch_tokens", "epochs", "dead_after_tokens", "calibration_tokens", "buffer_tokens"), 1),
            **dict.fromkeys(("logging_steps", "save_steps", "max_steps", "k_start"), 1),
        }
        for name, smallest in least.items():
            if (value := getattr(self, name)) is not None and value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}.")
        for name in ("learning_rate", "max_grad_norm", "outlier_ratio"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive.")
        for name in ("warmup_fraction", "decay_start", "k_annealing_fraction", "sparsity_warmup_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        for name, known in {"parallel": PARALLEL, "lr_scheduler_type": SCHEDULES, "decoder_init": INITS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Pass one of {', '.join(known)}.")

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the one it continues."""
        return {name: value for name, value in asdict(self).items() if name not in self.free}


def differing(before: Any, now: Any, path: str = "") -> list[str]:
    """In words, which values of nested JSON objects are not the same."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{path}={before!r}, not {now!r}"]
    names = sorted({*before, *now})
    return [line for name in names for line in differing(before.get(name), now.get(name), f"{path}.{name}".strip("."))]
