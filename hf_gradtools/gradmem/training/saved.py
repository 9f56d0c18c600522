"""Figures of a saved model: how well it answers, and what that costs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_gradtools.gradmem.configuration_gradmem import GradMemConfig
from hf_gradtools.gradmem.kv_retrieval import GradMemCollator, PromptCollator
from hf_gradtools.gradmem.training.cli_options import EvalOptions, PlotOptions
from hf_gradtools.gradmem.training.costs import AnswerCosts, answer_costs
from hf_gradtools.gradmem.training.evaluation import evaluate_rows, ignored_ids, with_wrong_contexts
from hf_gradtools.gradmem.training.stages import load_stage
from hf_gradtools.gradmem.training.starting import load_trained
from hf_gradtools.workflow.causal_lm import load_tokenizer


__all__ = ["costs_of_saved", "evaluate_saved"]


def evaluate_saved(options: EvalOptions) -> list[dict[str, Any]]:
    """Evaluates a saved model.

    Args:
        options ([`EvalOptions`]): model and task.

    Returns:
        one `dict` for each K: `metrics` (see [`~hf_gradtools.gradmem.training.evaluation.evaluate_batches`]),
        `wrong_context_exact_match` and what was evaluated.

    Raises:
        ValueError: the model or the task cannot be loaded, or they do not go together.
    """
    model = load_trained(options.model, dtype=torch.float32)
    on_cpu = options.device == "cpu" or not torch.accelerator.is_available()
    model = model.to("cpu" if on_cpu else torch.accelerator.current_accelerator())
    tokenizer = load_tokenizer(options.tokenizer_path or options.model)
    has_memory = isinstance(model.config, GradMemConfig)
    if options.K and not has_memory:
        raise ValueError(f"K={options.K}: the model {options.model!r} has no memory to write. Leave K out.")
    stage = load_stage(options.data_path, options.seed, options.rows)
    collator = (GradMemCollator if has_memory else PromptCollator)(
        tokenizer, max_context_length=options.max_context_length
    )
    evaluate = partial(
        evaluate_rows,
        model,
        collator=collator,
        batch_size=options.per_device_batch_size,
        ignored_ids=ignored_ids(tokenizer),
    )
    results = []
    for K in options.K or [None]:
        result = {
            "model": options.model,
            "task": stage.name,
            "num_pairs": stage.num_pairs,
            "vanilla": not has_memory,
            "grad_mode": model.config.grad_mode if has_memory else None,
            "K": (model.config.K if K is None else K) if has_memory else None,
            "rows": len(stage.valid),
            "seed": options.seed,
            "chance": stage.chance,
            "metrics": evaluate(stage.valid, K=K, generation=options.generation),
        }
        if options.wrong_context:
            wrong = evaluate(with_wrong_contexts(stage.valid), K=K, generation=False)
            result["wrong_context_exact_match"] = wrong["exact_match"]
        results.append(result)
    return results


def costs_of_saved(options: PlotOptions) -> dict[int, AnswerCosts]:
    """What answers cost a saved model, by tokens of the context; only its configuration is read.

    Raises:
        ValueError: it cannot be read, or has no memory.
    """
    try:
        config = AutoConfig.from_pretrained(options.cost_of)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"cost_of={options.cost_of!r} cannot be read: {reason}. Pass a trained model.") from error
    if not isinstance(config, GradMemConfig):
        raise ValueError(f"cost_of={options.cost_of!r} is a {config.model_type} without a memory. Pass one with it.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        length: answer_costs(model, length, options.query_tokens, options.answer_tokens, options.K)
        for length in options.lengths
    }
