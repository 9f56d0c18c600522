"""What the commands of `hf-gradtools sae` do, once their options are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from accelerate import PartialState
from torch import Tensor

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.hub import is_hub_id
from hf_gradtools.sae.browser import write_browser
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.contexts import top_contexts
from hf_gradtools.sae.extraction import extract
from hf_gradtools.sae.held_out import hold_out_tokens
from hf_gradtools.sae.hookpoints import list_hookpoints
from hf_gradtools.sae.metrics import SAEMetrics, evaluate
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.options import (
    ALL,
    BrowseOptions,
    CorpusOptions,
    EvalOptions,
    ExtractOptions,
    PushOptions,
    TrainOptions,
)
from hf_gradtools.sae.packing import token_blocks
from hf_gradtools.sae.saving import load_many, push_many
from hf_gradtools.sae.shuffling import ActivationSource
from hf_gradtools.sae.store import DTYPES, ActivationStore
from hf_gradtools.sae.streaming import ModelActivations
from hf_gradtools.sae.trainer import SAETrainer
from hf_gradtools.sae.training_config import SAETrainingConfig
from hf_gradtools.workflow.causal_lm import load_model, load_tokenizer
from hf_gradtools.workflow.data import load_rows


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["browse", "evaluate_saved", "extract_activations", "push", "train"]


def extract_activations(options: ExtractOptions) -> None:
    """Writes a store; several processes share the sequences."""
    process = PartialState(cpu=options.use_cpu)
    model, tokenizer = _model(options, process.device)
    store = extract(
        model,
        _sequences(options, tokenizer),
        options.chosen_hookpoints or list_hookpoints(model),
        options.output_dir,
        batch_size=options.batch_size,
        dtype=options.dtype,
        skip_positions=options.skip_positions,
        model_name=options.model,
        tokenizer_name=options.model,
        corpus={"dataset": options.dataset, "split": options.split, "max_tokens": options.max_tokens},
        rank=process.process_index,
        world_size=process.num_processes,
        progress=process.is_local_main_process,
    )
    process.wait_for_everyone()
    if process.is_main_process:
        names = store.hookpoints
        typer.echo(f"{options.output_dir}: {store.num_tokens:,} tokens of {', '.join(names)}")


def train(options: TrainOptions, sae: Mapping[str, Any], args: SAETrainingConfig) -> None:
    """Trains autoencoders, and tells of each.

    Args:
        options ([`TrainOptions`]): the activations.
        sae (`Mapping[str, Any]`): fields of [`SAEConfig`] that do not depend on the hookpoint.
        args ([`SAETrainingConfig`]): how.
    """
    source, described = _stored(options) if options.store is not None else _streamed(options, args.use_cpu)
    model_name = described["model"] if is_hub_id(described["model"]) else None
    configs = {
        name: SAEConfig(
            d_in=source.d_in(name),
            d_sae=options.num_features or options.expansion_factor * source.d_in(name),
            matryoshka_widths=tuple(options.matryoshka),
            model_name=model_name,
            metadata={"data": {key: _without_folders(value) for key, value in described.items()}},
            **sae,
        )
        for name in source.hookpoints
    }
    training, held_out = hold_out_tokens(source, options.eval_share)
    saes = SAETrainer(configs, training, args, held_out).train(resume=options.resume)
    for name, trained in saes.items():
        typer.echo(f"{args.output_dir}/{name}: {_told(trained.config)}")


def evaluate_saved(options: EvalOptions) -> None:
    """Measures autoencoders, prints a table, and writes JSON."""
    saes, model, tokenizer = _with_model(options, options.saes, PartialState(cpu=options.use_cpu).device)
    figures = evaluate(
        model,
        saes,
        _sequences(options, tokenizer),
        batch_size=options.batch_size,
        skip_positions=options.skip_positions,
        loss_sequences=options.loss_sequences,
    )
    typer.echo(_table(figures))
    if options.out is not None:
        Path(options.out).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(Path(options.out), {name: one.to_dict() for name, one in figures.items()})


def browse(options: BrowseOptions) -> None:
    """Writes a page for each autoencoder."""
    saes, model, tokenizer = _with_model(options, options.saes, PartialState(cpu=options.use_cpu).device)
    contexts = top_contexts(
        model,
        saes,
        _sequences(options, tokenizer),
        n=options.num_examples,
        features=options.features or None,
        batch_size=options.batch_size,
        skip_positions=options.skip_positions,
    )
    for name, found in contexts.items():
        page = write_browser(
            Path(options.output_dir) / f"{name}.html",
            found,
            tokenizer,
            sae=saes[name],
            model=model,
            features=options.features or None,
            num_features=options.num_features,
            subtitle=f"{options.model or saes[name].config.model_name}, {options.dataset}",
        )
        typer.echo(page)


def push(options: PushOptions) -> None:
    """Uploads autoencoders with their card."""
    saes = load_many(options.saes, None if options.hookpoints == [ALL] else options.hookpoints)
    typer.echo(push_many(saes, options.repo_id, private=options.private or None))


# ---- parts


def _model(options: CorpusOptions, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    assert options.model is not None  # options check it, or take it from autoencoders
    model = load_model(options.model, options.model_dtype)
    torch.nn.Module.to(model, device)  # transformers wraps .to() in a way that has no types
    return model.eval(), load_tokenizer(options.model)


def _sequences(options: CorpusOptions, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    assert options.dataset is not None
    rows = load_rows(options.dataset, options.split)
    return token_blocks(
        rows, tokenizer, options.context_length, text_column=options.text_column, max_tokens=options.max_tokens
    )


def _with_model(
    options: EvalOptions | BrowseOptions, path: str, device: torch.device
) -> tuple[dict[str, SAE], PreTrainedModel, PreTrainedTokenizerBase]:
    """Autoencoders, and the model that they are of."""
    saes = {name: sae.to(device) for name, sae in load_many(path, options.chosen_hookpoints).items()}
    if options.model is None:
        names = sorted({str(sae.config.model_name) for sae in saes.values()})
        if len(names) != 1 or names == ["None"]:
            raise ValueError(f"saes={path!r} name no single Hub model ({', '.join(names)}). Pass model=... .")
        options.model = names[0]
    return saes, *_model(options, device)


def _stored(options: TrainOptions) -> tuple[ActivationSource, dict[str, Any]]:
    store = ActivationStore.open(str(options.store))
    source = store.source(options.chosen_hookpoints)
    identity = store.identities[source.hookpoints[0]]
    kept = ("context_length", "skip_positions", "sequences")
    corpus = {"model": identity["model"], "dataset": identity["corpus"].get("dataset")}
    return source, corpus | {key: identity[key] for key in kept}


def _streamed(options: TrainOptions, use_cpu: bool) -> tuple[ActivationSource, dict[str, Any]]:
    from hf_gradtools.sae.tokens_digest import sequences_digest

    model, tokenizer = _model(options, PartialState(cpu=use_cpu).device)
    sequences = _sequences(options, tokenizer)
    source = ModelActivations(
        model,
        sequences,
        options.chosen_hookpoints or list_hookpoints(model),
        options.batch_size,
        DTYPES[options.dtype],
        options.skip_positions,
    )
    return source, {
        "model": options.model,
        "dataset": options.dataset,
        "context_length": options.context_length,
        "skip_positions": options.skip_positions,
        "sequences": sequences_digest(sequences),
    }


def _without_folders(value: Any) -> Any:
    """A Hub id as it is, of a path of this machine its last part."""
    return Path(value).name if isinstance(value, str) and not is_hub_id(value.partition(":")[0]) else value


def _told(config: SAEConfig) -> str:
    tokens = f"trained on {config.metadata['training']['tokens']:,} tokens"
    figures = config.metadata.get("evaluation")
    if figures is None:
        return tokens
    return f"FVU {_number(figures['fvu'])}, L0 {figures['l0']:.1f}, dead {figures['dead_fraction']:.1%}; {tokens}"


def _table(figures: Mapping[str, SAEMetrics]) -> str:
    rows: list[Sequence[str]] = [("hookpoint", "FVU", "L0", "dead", "cosine", "CE recovered")]
    for name, one in figures.items():
        recovered = None if one.cross_entropy is None else one.cross_entropy.recovered
        cells = (_number(one.fvu), f"{one.l0:.1f}", f"{one.dead_fraction:.1%}", f"{one.cosine:.4f}")
        rows.append((name, *cells, _number(recovered)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
