"""What the examples share: the run with its few lines of output, and accuracy on questions with known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_gradtools.grit.train import GritRun, prepare_run
from hf_gradtools.grit.train_config import GritTrainConfig
from hf_gradtools.workflow.tokenizing import tokenize_rows


def fine_tune(arguments: GritTrainConfig, format_row: Callable[[dict[str, Any]], dict[str, str]]) -> GritRun:
    """Trains as the arguments say on what `format_row` makes of the rows, and says what became of it."""
    run = prepare_run(arguments, format_row)
    print(run.summary())
    metrics = run.train()
    print(
        f"loss        {metrics['eval_loss_before']:.4f} before, {metrics['eval_loss_after']:.4f} after "
        f"{metrics['steps']} steps in {metrics['seconds']:.0f} s\n"
        f"adapter     {metrics['parameters']:,} of {metrics['base_parameters']:,} parameters: {arguments.output_dir}"
    )
    return run


def accuracy(run: GritRun, answers: Sequence[str]) -> float:
    """Share of the held-out rows whose completion the model finds likelier than the other answers."""
    scores = [log_likelihoods(run, answer) for answer in answers]
    right = {row["sample_id"]: answers.index(row["completion"]) for row in run.held_out}
    asked = [i for i in right if all(i in score for score in scores)]  # the others are longer than max_length
    return sum(max(range(len(answers)), key=lambda n: scores[n][i]) == right[i] for i in asked) / max(len(asked), 1)


@torch.no_grad()
def log_likelihoods(run: GritRun, answer: str) -> dict[int, float]:
    """Of one answer to every held-out row, by the row's id."""
    model = run.trainer.model.eval()
    questions = run.held_out.remove_columns("completion")
    rows = questions.add_column("completion", [answer] * len(questions))
    rows = tokenize_rows(rows, run.trainer.processing_class, run.row_format, run.config.max_length)
    batches = DataLoader(
        rows.remove_columns(["sample_id", "text"]), run.config.batch_size, collate_fn=run.trainer.data_collator
    )
    found: list[float] = []
    for batch in batches:
        batch = {name: values.to(model.device) for name, values in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")  # 0 where labels are -100
        found += (-losses.sum(1)).tolist()
    return dict(zip(rows["sample_id"], found, strict=True))
