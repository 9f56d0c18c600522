"""What a question about a text looks like."""

from __future__ import annotations

from datasets import Features, Value


FEATURES = Features({name: Value("string") for name in ("context", "query", "target")})
TEMPLATE = "Question: {question}\nAnswer:"


def make_row(context: str, question: str, answer: str, template: str) -> dict[str, str]:
    """A row for the collators; the space before the answer is a part of its first token.

    Raises:
        ValueError: the template has no place for the question.
    """
    if "{question}" not in template:
        raise ValueError(f"template={template!r} has no {{question}}. Write it like {TEMPLATE!r}.")
    return {
        "context": context.strip(),
        "query": template.replace("{question}", question.strip()),
        "target": f" {answer.strip()}",
    }
