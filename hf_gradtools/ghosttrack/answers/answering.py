"""A model's own answers to questions, closed-book, labelled right or wrong: data to detect hallucinations in.

The model continues a few fixed examples and one question up to the end of the line, greedily. An answer counts as
right if, normalised, it equals an accepted one or has it as whole words (`alias_matching.py`): a string rule that errs
both ways, so every row says which of the two it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.core.store import RowStore, read_table
from hf_gradtools.ghosttrack.answers.alias_matching import match_alias, normalize_answer, semantic_entropy
from hf_gradtools.ghosttrack.answers.generation import Line, LineGenerator
from hf_gradtools.ghosttrack.answers.questions import Questions
from hf_gradtools.ghosttrack.reading.batching import batches_by_length


__all__ = [
    "DEFAULT_SHOTS",
    "TEMPLATE",
    "Shot",
    "balance",
    "generate_answers",
    "group_by_answer",
    "sample_answers",
    "without_shots",
]

logger = logging.getLogger(__name__)

TEMPLATE = "Question: {question}\nAnswer:"


class Shot(NamedTuple):
    """An example that is put before every question."""

    question: str
    answer: str


DEFAULT_SHOTS = (
    Shot("Which planet is nearest to the Sun?", "Mercury"),
    Shot("Who wrote the play Romeo and Juliet?", "William Shakespeare"),
    Shot("In what year did the Berlin Wall fall?", "1989"),
)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    store: str | os.PathLike[str],
    *,
    shots: Sequence[Shot] = DEFAULT_SHOTS,
    template: str = TEMPLATE,
    max_new_tokens: int = 24,
    batch_size: int = 64,
    contained: bool = True,
    share_prefix: bool = True,
) -> Dataset:
    """Lets the model answer, and labels what it says. A killed call goes on where it was when made again.

    Args:
        model (`PreTrainedModel`): a causal LM, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        questions (`Questions`): see `read_questions`.
        store (`str` or `os.PathLike`): folder for the rows of each batch as soon as it is done.
        shots (`Sequence[Shot]`): examples; none of them may be asked.
        template (`str`): of a question, with `{question}`; an answer follows behind a space, an empty line behind it.
        max_new_tokens (`int`, defaults to 24): of an answer.
        batch_size (`int`, defaults to 64): questions at a time.
        contained (`bool`, defaults to `True`): an answer that has an accepted one as whole words is right, too.
        share_prefix (`bool`, defaults to `True`): see `LineGenerator`.

    Returns:
        `datasets.Dataset`: in the order of the questions, those without an answer left out with one warning:
        `text` (examples, question and answer: what the model read and wrote), `question_start` and `answer_start`
        (characters), `answer`, `label` (1 = wrong), `match` (`"exact"`, `"contained"`, `"none"`), `group` (equal for
        equal questions), `category`, `question`, `generated_tokens`, `generated_mean_logprob`,
        `generated_sum_logprob`, `generated_min_logprob`, `generated_mean_entropy`, `generated_max_entropy` (nats, as
        the answer was generated), `generated_end` (whether the line ended within `max_new_tokens`).

    Raises:
        ValueError: an example is asked, too, the template has no question, or a prompt is too long.
        StoreMismatchError: the store is of another model, of other questions or settings.
    """
    examples = few_shot_text(shots, template)
    _check_shots(shots, questions)
    prompts = [examples + fill(template, question) for question in questions.texts]
    generator = LineGenerator(model, tokenizer, prompts, max_new_tokens=max_new_tokens, share_prefix=share_prefix)
    identity = {**_identity(model, prompts), "max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def answer(rows: list[int], batch: int) -> pa.Table:
        lines = generator(rows)
        return pa.table({"row": pa.array(rows, pa.int64()), "line": [line.text for line in lines], **_scalars(lines)})

    generated = _run_batches(store, {"what": "answers", **identity}, generator.lengths, batch_size, answer)
    return _labelled(generated, questions, prompts, len(examples), contained)


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    store: str | os.PathLike[str],
    *,
    num_samples: int = 5,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    seed: int = 0,
    share_prefix: bool = True,
) -> Dataset:
    """Adds other answers to the same prompts, drawn at temperature 1, and their semantic entropy. Resumes as well.

    It costs `num_samples` times what `generate_answers` costs for as many rows, and is a call of its own so that it
    can be left out, or be made for the rows that are kept.

    Args:
        model (`PreTrainedModel`): a causal LM, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        rows (`datasets.Dataset`): of [`generate_answers`].
        store (`str` or `os.PathLike`): folder for the rows of each batch.
        num_samples (`int`, defaults to 5): for each row.
        max_new_tokens (`int`, defaults to 24): of a sample.
        batch_size (`int`, defaults to 16): rows at a time, so `num_samples` times as many sequences.
        seed (`int`, defaults to 0): of the draws; each batch has its own, made from it.
        share_prefix (`bool`, defaults to `True`): see `LineGenerator`.

    Returns:
        `datasets.Dataset`: the rows with `samples` (a list of texts) and `semantic_entropy` (see
        `alias_matching.py`: by string rules, without an NLI model).
    """
    if num_samples < 2:
        raise ValueError(f"num_samples={num_samples} has no entropy; need at least 2. Pass num_samples=5.")
    prompts = prompts_of(rows)
    generator = LineGenerator(model, tokenizer, prompts, max_new_tokens=max_new_tokens, share_prefix=share_prefix)
    settings = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}

    def sample(batch_rows: list[int], batch: int) -> pa.Table:
        repeated = [row for row in batch_rows for _ in range(num_samples)]
        draw = int(np.random.SeedSequence([seed, batch]).generate_state(1)[0])
        texts = [line.text.strip() for line in generator(repeated, seed=draw)]
        samples = [texts[start : start + num_samples] for start in range(0, len(texts), num_samples)]
        return pa.table({"row": pa.array(batch_rows, pa.int64()), "samples": pa.array(samples, pa.list_(pa.string()))})

    identity = {"what": "samples", **_identity(model, prompts), **settings}
    samples = _run_batches(store, identity, generator.lengths, batch_size, sample)["samples"]
    entropies = [semantic_entropy(row) for row in samples]
    return rows.add_column("samples", samples).add_column("semantic_entropy", entropies)


def balance(rows: Dataset, wrong_per_right: float = 2.0, seed: int = 0) -> Dataset:
    """All rows that are right and at most `wrong_per_right` times as many wrong ones, drawn at random; order is kept.

    The share of wrong answers is then one of this choice, not of the model.

    Raises:
        ValueError: there are no right or no wrong rows.
    """
    labels = np.asarray(rows["label"][:])
    right, wrong = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    if not len(right) or not len(wrong):
        raise ValueError(
            f"rows have {len(right)} right and {len(wrong)} wrong answers; detection needs both. Ask more questions, "
            "or another model."
        )
    count = min(len(wrong), round(wrong_per_right * len(right)))
    kept = np.random.default_rng(seed).permutation(wrong)[:count]
    return rows.select(np.sort(np.concatenate([right, kept])))


def group_by_answer(rows: Dataset) -> Dataset:
    """The rows with groups joined that have an answer in common.

    A small model gives the same few answers to hundreds of questions. Split by question alone, they would stand in
    training and test folds both, where a detector need only remember which of them are wrong.
    """
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    keys = [("question", group) for group in rows["group"][:]]
    for key, answer in zip(keys, rows["answer"][:], strict=True):
        parent[root(("answer", normalize_answer(answer)))] = root(key)
    numbers: dict[Any, int] = {}
    joined = [numbers.setdefault(root(key), len(numbers)) for key in keys]
    return rows.remove_columns("group").add_column("group", joined)


def without_shots(rows: Dataset) -> Dataset:
    """The rows with the examples cut off `text`: shorter to read, but not what the model answered from."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        start = row["question_start"]
        return {"text": row["text"][start:], "answer_start": row["answer_start"] - start, "question_start": 0}

    return rows.map(cut, desc="Cutting examples")


def prompts_of(rows: Dataset) -> list[str]:
    """What was before the answers; the space between belongs to the answer's first token."""
    return [text[:start].rstrip(" ") for text, start in zip(rows["text"], rows["answer_start"], strict=True)]


def fill(template: str, question: str) -> str:
    """The template with a question in it; ValueError if it has no place for one."""
    if "{question}" not in template:
        raise ValueError(f"template={template!r} has no {{question}}. Write it like {TEMPLATE!r}.")
    return template.replace("{question}", question.strip())


def few_shot_text(shots: Iterable[Shot], template: str) -> str:
    """The examples, each with its answer and an empty line."""
    return "".join(f"{fill(template, question)} {answer}\n\n" for question, answer in shots)


def _check_shots(shots: Sequence[Shot], questions: Questions) -> None:
    asked = {normalize_answer(text): row for row, text in enumerate(questions.texts)}
    for number, shot in enumerate(shots):
        if (row := asked.get(normalize_answer(shot.question))) is not None:
            raise ValueError(
                f"shots[{number}] is question {row}, too: {shot.question!r}. Its answer is given away; pass another "
                "example, or leave the question out."
            )


def _identity(model: PreTrainedModel, prompts: Sequence[str]) -> dict[str, Any]:
    return {
        "model": model.config.name_or_path or type(model).__name__,
        "dtype": str(model.dtype),
        "num_parameters": model.num_parameters(),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
    }


def _run_batches(
    path: str | os.PathLike[str],
    identity: dict[str, Any],
    lengths: Sequence[int],
    batch_size: int,
    run: Callable[[list[int], int], pa.Table],
) -> dict[str, list[Any]]:
    """Runs the batches that the store does not have yet; returns its columns in the order of the rows.

    Batches are appended whole and in a fixed order, so their number says which are done.
    """
    batches = list(batches_by_length(lengths, batch_size))
    with RowStore(path, identity) as store:
        done = -(-store.num_rows // batch_size)
        for number in tqdm(range(done, len(batches)), initial=done, total=len(batches), desc=identity["what"]):
            store.append(run(batches[number], number))
        store.finish()
    return read_table(path).sort_by("row").to_pydict()


def _scalars(lines: Sequence[Line]) -> dict[str, list[Any]]:
    logprobs, entropies = [line.logprobs for line in lines], [line.entropies for line in lines]
    return {
        "generated_tokens": [len(row) for row in logprobs],
        "generated_mean_logprob": [float(np.mean(row)) for row in logprobs],
        "generated_sum_logprob": [float(np.sum(row)) for row in logprobs],
        "generated_min_logprob": [float(np.min(row)) for row in logprobs],
        "generated_mean_entropy": [float(np.mean(row)) for row in entropies],
        "generated_max_entropy": [float(np.max(row)) for row in entropies],
        "generated_end": [line.ended for line in lines],
    }


def _labelled(
    generated: dict[str, list[Any]], questions: Questions, prompts: Sequence[str], question_start: int, contained: bool
) -> Dataset:
    lines = generated["line"]
    answers = [line.strip() for line in lines]
    matches = [match_alias(a, known, contained=contained) for a, known in zip(answers, questions.answers, strict=True)]
    rows = Dataset.from_dict({
        "text": [prompt + line for prompt, line in zip(prompts, lines, strict=True)],
        "question_start": [question_start] * len(lines),
        "answer_start": [
            len(prompt) + len(line) - len(line.lstrip()) for prompt, line in zip(prompts, lines, strict=True)
        ],
        "answer": answers,
        "label": [int(match == "none") for match in matches],
        "match": matches,
        "group": questions.groups,
        "category": questions.categories,
        "question": questions.texts,
        **{name: values for name, values in generated.items() if name.startswith("generated_")},
    })  # fmt: skip
    answered = [row for row, answer in enumerate(answers) if normalize_answer(answer)]
    if len(answered) < len(rows):
        logger.warning(f"{len(rows) - len(answered)} of {len(rows)} questions got no answer and are left out")
    return rows.select(answered)
