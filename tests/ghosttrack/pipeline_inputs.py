"""A whole GhostTrack run in small: texts, labelled answers and a configuration for the tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig


QUESTIONS = 40
RIGHT, WRONG = "a", "b"  # how answers begin


def write_texts(path: Path, count: int = 120) -> Path:
    draw = random.Random(1)
    lines = [" ".join(draw.choices([*"abcdefghij", *map(str, range(10))], k=24)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def write_answers(path: Path, count: int = QUESTIONS, label=None) -> Path:
    """Two answers of each question, of one length: the first letter tells the true one, the second nothing."""
    draw = random.Random(2)
    rows = []
    for group in range(count):
        question = f"{draw.choice('abcdefghij')} {draw.randrange(10)} {draw.choice('abcdefghij')}?"
        for wrong, word in enumerate((RIGHT, WRONG)):
            prompt = f"Question: {question} Answer: "
            answer = f"{word} {draw.choice('abcdefghij')}"
            rows.append({
                "text": prompt + answer, "answer_start": len(prompt), "answer": answer, "question": question,
                "label": wrong if label is None else label, "group": group,
                "category": "early" if question[0] < "f" else "late",
            })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(folder: Path, base_model: Path, inputs: Path | None = None, **sections) -> GhostTrackConfig:
    """Settings of a run in `folder`, of the texts and answers in `inputs`, by default there as well."""
    inputs = inputs or folder
    content = {
        "model": {"base_model": str(base_model), "d_model": 32, "n_layers": 2},
        "sae": {"d_model": 32, "d_hidden": 64, "k": 4},
        "sae_training": {
            "n_tokens": 2000, "epochs": 2, "batch_size": 100, "learning_rate": 1e-3, "save_steps": 5, "holdout": 0.1,
            "buffer_tokens": 512,
        },
        "paths": {"cache_dir": str(folder / "cache"), "models_dir": str(folder / "models"),
                  "results_dir": str(folder / "results")},
        "extraction": {"dataset": str(inputs / "texts.jsonl"), "batch_size": 16, "max_length": 20},
        "tracking": {"top_k": 8, "birth": 0.0},
        "detection": {"dataset": str(inputs / "answers.jsonl"), "batch_size": 16},
        "evaluation": {"folds": 2, "inner_folds": 2, "bootstrap_samples": 50, "n_cases": 4},
    }  # fmt: skip
    for section, values in sections.items():
        content[section] = {**content[section], **values}
    path = folder / "config.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return GhostTrackConfig.from_yaml(path)


def files_below(folder: Path) -> dict[str, Any]:
    """Content by name; of safetensors the header as it is meant, since its entries come in any order."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
