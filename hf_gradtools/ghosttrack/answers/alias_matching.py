"""Whether two short answers say the same: string rules as in the evaluation of TriviaQA and NQ-open, no model."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence

import numpy as np


__all__ = ["cluster_answers", "match_alias", "normalize_answer", "semantic_entropy"]

PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`“”–—", " "))
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces.

    Punctuation becomes a space, so that "Coca-Cola" and "Coca Cola" are the same; an apostrophe, however, vanishes.

    Source: the official TriviaQA evaluation (arXiv 1705.03551) and SQuAD's (arXiv 1606.05250).
    """
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text.lower()).translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def match_alias(answer: str, aliases: Iterable[str], *, contained: bool = True) -> str:
    """How an answer matches one of the accepted ones, both normalised.

    Args:
        answer (`str`): what was answered.
        aliases (`Iterable[str]`): accepted answers; those of which nothing is left when normalised never match.
        contained (`bool`, defaults to `True`): whether an alias may also stand inside the answer, as whole words.

    Returns:
        `str`: `"exact"`, `"contained"` or `"none"`.
    """
    normalized = normalize_answer(answer)
    accepted = {normalize_answer(alias) for alias in aliases} - {""}
    if normalized in accepted:
        return "exact"
    if contained and any(_has_words(normalized, alias) for alias in accepted):
        return "contained"
    return "none"


def cluster_answers(answers: Sequence[str]) -> list[int]:
    """Number of the cluster of each answer; two answers share one if, normalised, one contains the other's words.

    Containment is closed transitively. This is no entailment: no NLI model is used, so paraphrases stay apart and
    "not Paris" joins "Paris". Empty answers form a cluster of their own.
    """
    texts = [normalize_answer(answer) for answer in answers]
    clusters = list(range(len(texts)))
    for i, text in enumerate(texts):
        for j in range(i):
            same = text == texts[j] or _has_words(text, texts[j]) or _has_words(texts[j], text)
            if same and clusters[i] != clusters[j]:
                old, new = max(clusters[i], clusters[j]), min(clusters[i], clusters[j])
                clusters = [new if cluster == old else cluster for cluster in clusters]
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    return [numbers[cluster] for cluster in clusters]


def semantic_entropy(samples: Sequence[str]) -> float:
    """Entropy in nats over the clusters of [`cluster_answers`], each as likely as its share of the samples.

    Source: discrete semantic entropy of Farquhar et al., Nature 2024, with string rules in place of their NLI model.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("samples has 0 answers; semantic entropy needs at least 1. Pass those of sample_answers.")
    shares = np.bincount(cluster_answers(samples)) / len(samples)
    return abs(float(-(shares * np.log(shares)).sum()))


def _has_words(text: str, words: str) -> bool:
    return bool(words) and f" {words} " in f" {text} "
