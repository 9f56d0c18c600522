"""Options of `hf-gradtools sae`. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

from dataclasses import dataclass, field


__all__ = ["ALL", "BrowseOptions", "CorpusOptions", "EvalOptions", "ExtractOptions", "PushOptions", "TrainOptions"]

ACTIVATION_DTYPES = ("bfloat16", "float16", "float32")
ALL = "all"


@dataclass(kw_only=True)
class CorpusOptions:
    """A causal LM and texts that go through it.

    Args:
        model: Hub id or folder of a causal LM; by default the one the autoencoders were trained on.
        dataset: texts: a Hub id (`id` or `id:config`), a `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file, or a
            folder made by `save_to_disk`.
        split: split of `dataset`, default "train".
        text_column: column of the text; default by the usual names.
        context_length: tokens of a sequence; texts are packed into sequences without padding.
        max_tokens: of the texts, at most.
        skip_positions: first positions of each sequence that are left out: attention sinks.
        batch_size: sequences of a forward.
        hookpoints: such as layers.5 layers.10, or all.
        model_dtype: of the model's weights; "auto" is as they are stored.

    Raises:
        ValueError: an option is out of range.
    """

    model: str | None = None
    dataset: str | None = None
    split: str | None = None
    text_column: str | None = None
    context_length: int = 512
    max_tokens: int | None = None
    skip_positions: int = 1
    batch_size: int = 8
    hookpoints: list[str] = field(default_factory=lambda: [ALL])
    model_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, smallest in {"context_length": 2, "max_tokens": 1, "skip_positions": 0, "batch_size": 1}.items():
            if (value := getattr(self, name)) is not None and value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}.")
        if self.model_dtype not in ("auto", *ACTIVATION_DTYPES):
            known = ", ".join(("auto", *ACTIVATION_DTYPES))
            raise ValueError(f"model_dtype={self.model_dtype!r} is unknown. Pass one of {known}.")
        if not self.hookpoints or (ALL in self.hookpoints and len(self.hookpoints) > 1):
            raise ValueError(f"hookpoints={self.hookpoints} is no choice. Pass names such as layers.5, or {ALL}.")

    @property
    def chosen_hookpoints(self) -> list[str] | None:
        """Those that were named; `None` is all."""
        return None if self.hookpoints == [ALL] else self.hookpoints


@dataclass(kw_only=True)
class ExtractOptions(CorpusOptions):
    """Activations to be written to disk.

    Args:
        output_dir: folder of the store; an extraction that was killed goes on there.
        dtype: of the activations: bfloat16, float16 or float32.
        use_cpu: leave an accelerator alone.
    """

    output_dir: str
    dtype: str = "bfloat16"
    use_cpu: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self, "model", "dataset")
        _check_dtype(self.dtype)


@dataclass(kw_only=True)
class TrainOptions(CorpusOptions):
    """Activations to train on: of a store on disk, or of a model and texts as they come.

    Args:
        store: folder of a store that `sae extract` wrote; instead of `model` and `dataset`.
        dtype: of the activations of a model: bfloat16, float16 or float32.
        num_features: of each autoencoder; default `expansion_factor` times the width of the hidden states.
        expansion_factor: see `num_features`.
        matryoshka: numbers of first features that must each reconstruct alone; the last is all of them.
        eval_share: of the tokens, the last ones, on which the finished autoencoders are evaluated; 0 for none.
        resume: go on with an earlier training in `output_dir`, or begin if there is none.
    """

    store: str | None = None
    dtype: str = "bfloat16"
    num_features: int | None = None
    expansion_factor: int = 8
    matryoshka: list[int] = field(default_factory=list)
    eval_share: float = 0.05
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_dtype(self.dtype)
        if self.store is None:
            _need(self, "model", "dataset", instead=", or store=... alone")
        elif self.model is not None or self.dataset is not None:
            raise ValueError(f"store={self.store!r} holds activations already. Leave out model and dataset, or store.")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} must be at least 0 and below 1.")
        for name in ("num_features", "expansion_factor"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")


@dataclass(kw_only=True)
class EvalOptions(CorpusOptions):
    """Autoencoders to be measured.

    Args:
        saes: folder or Hub id of autoencoders.
        loss_sequences: sequences on which the model's loss is measured with each of them in place; default all, 0 for
            none.
        out: JSON file to write.
        use_cpu: leave an accelerator alone.
    """

    saes: str
    loss_sequences: int | None = None
    out: str | None = None
    use_cpu: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self, "dataset")


@dataclass(kw_only=True)
class BrowseOptions(CorpusOptions):
    """Pages of features, an HTML file for each autoencoder.

    Args:
        saes: folder or Hub id of autoencoders.
        output_dir: where the pages go.
        features: numbers of the features to show; default those worth a look.
        num_features: how many of these.
        num_examples: texts for each feature.
        use_cpu: leave an accelerator alone.
    """

    saes: str
    output_dir: str
    features: list[int] = field(default_factory=list)
    num_features: int = 50
    num_examples: int = 20
    use_cpu: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self, "dataset")
        for name in ("num_features", "num_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


@dataclass(kw_only=True)
class PushOptions:
    """Autoencoders to be uploaded.

    Args:
        saes: folder of autoencoders.
        repo_id: on the Hub, such as user/saes; made if absent.
        hookpoints: which, or all.
        private: whether a new repository is private.
    """

    saes: str
    repo_id: str
    hookpoints: list[str] = field(default_factory=lambda: [ALL])
    private: bool = False


def _need(options: CorpusOptions, *names: str, instead: str = "") -> None:
    missing = [name for name in names if getattr(options, name) is None]
    if missing:
        passed = " and ".join(f"{name}=..." for name in missing)
        raise ValueError(f"there is no {' and no '.join(missing)}. Pass {passed}{instead}.")


def _check_dtype(dtype: str) -> None:
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown. Pass one of {', '.join(ACTIVATION_DTYPES)}.")
