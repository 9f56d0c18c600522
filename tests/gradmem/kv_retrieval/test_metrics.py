"""Metrics against cases counted by hand."""

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_gradtools.gradmem.kv_retrieval import (
    compute_metrics,
    exact_match,
    preprocess_logits_for_metrics,
    token_accuracy,
)


STRUCTURE = (4, 7)
LABELS = torch.tensor(
    [
        [-100, 8, 9, 4, 7],
        [-100, 8, 9, 4, 7],
        [-100, -100, 10, 4, 7],
        [-100, -100, -100, 4, 7],
        [-100, -100, -100, -100, -100],
    ]
)
PREDICTIONS = torch.tensor(
    [
        [0, 8, 9, 4, 7],  # all right
        [0, 8, 8, 4, 7],  # one wrong
        [0, 0, 10, 0, 0],  # right but for the structure
        [0, 0, 0, 0, 7],
        [0, 0, 0, 0, 0],
    ]
)


@pytest.mark.parametrize(("ignored", "matched", "tokens"), [((), 1 / 4, 9 / 13), (STRUCTURE, 2 / 3, 4 / 5)])
def test_counts(ignored, matched, tokens):
    assert exact_match(PREDICTIONS, LABELS, ignored) == pytest.approx(matched)
    assert token_accuracy(PREDICTIONS, LABELS, ignored) == pytest.approx(tokens)


def test_without_answers_there_is_no_share():
    nothing = torch.full((2, 3), -100)
    assert math.isnan(exact_match(torch.zeros(2, 3), nothing))
    assert math.isnan(token_accuracy(torch.zeros(2, 3), nothing))


def test_trainer_s_predictions_are_of_the_next_place():
    shifted = np.concatenate([PREDICTIONS[:, 1:].numpy(), np.full((5, 1), -100)], axis=1)
    prediction = EvalPrediction(predictions=shifted, label_ids=LABELS.numpy())
    assert compute_metrics(prediction) == pytest.approx({"exact_match": 1 / 4, "token_accuracy": 9 / 13})
    assert compute_metrics(prediction, STRUCTURE) == pytest.approx({"exact_match": 2 / 3, "token_accuracy": 4 / 5})


def test_logits_become_tokens():
    logits = torch.eye(3)[torch.tensor([[2, 0], [1, 1]])]
    for given in (logits, (logits, "more")):
        assert preprocess_logits_for_metrics(given, None).tolist() == [[2, 0], [1, 1]]
