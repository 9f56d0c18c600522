"""Charts as SVG text: pure functions of numbers. Colours are the page's variables, with values of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape


__all__ = ["MISSING", "format_number", "interval_plot", "roc_curve", "roc_plot", "score_histogram", "svg"]

MISSING = "–"
INK, SOFT, LINE = "var(--ink,#171a21)", "var(--soft,#5c6472)", "var(--line,#e3e6eb)"
FACTUAL, HALLUCINATED = "var(--helps,#1d6fb8)", "var(--harms,#c4511a)"
PLAIN = "var(--plain,#6a7286)"
SERIES = (
    FACTUAL,
    HALLUCINATED,
    "var(--good,#1c7a4b)",
    "var(--violet,#7a4fb5)",
    "var(--ochre,#9a7400)",
    PLAIN,
)
MAX_LABEL = 44
CHARACTER = 6.4  # width of a character at 12 px, roughly
MAX_CURVE_POINTS = 200


def svg(width: float, height: float, body: Sequence[str], label: str) -> Markup:
    """A chart that keeps its proportions, is at most `width` pixels wide, and is read out as `label`."""
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}" style="width:100%;max-width:{width:g}px;height:auto;display:block;'
        f'font:12px system-ui,-apple-system,Segoe UI,Roboto,sans-serif">{"".join(body)}</svg>'
    )


def line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1, dash: str = "") -> str:
    dashes = f";stroke-dasharray:{dash}" if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'style="stroke:{color};stroke-width:{width:.2f}{dashes}"/>'
    )


def text(x: float, y: float, content: str, anchor: str = "start", color: str = SOFT, weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{color};font-weight:{weight};'
        f'font-variant-numeric:tabular-nums">{escape(content)}</text>'
    )


def shorten(label: str, most: int = MAX_LABEL) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def format_number(number: Any, decimals: int = 3, signed: bool = False) -> str:
    """`1,204`, `0.848`, `+0.012`; what is missing or no finite number becomes a dash, and text stays."""
    if number is None or (isinstance(number, float | np.floating) and not math.isfinite(number)):
        return MISSING
    if isinstance(number, bool | np.bool_):
        return "yes" if number else "no"
    if isinstance(number, int | np.integer):
        return f"{int(number):{'+' * signed},}".replace("-", "−")
    if isinstance(number, float | np.floating):
        return f"{float(number):{'+' * signed},.{decimals}f}".replace("-", "−")
    return str(number)


def interval_plot(
    rows: Sequence[tuple[str, float, float, float, bool]], *, chance: float | None = 0.5, label: str = "AUROC"
) -> Markup:
    """Dots with whiskers on one axis.

    Args:
        rows (`Sequence`): (name, estimate, low, high, highlighted); an estimate that is not finite has no dot, and
            bounds that are not finite no whisker.
        chance (`float`, *optional*, defaults to 0.5): where a dashed line stands.
        label (`str`, defaults to `"AUROC"`): of the axis.

    Returns:
        `Markup`: SVG.
    """
    numbers = [number for _, *numbers, _ in rows for number in numbers if math.isfinite(number)]
    numbers += [chance] if chance is not None else [] if numbers else [0.0]
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if max(numbers) - min(numbers) <= 6 * s), 1.0)
    low, high = math.floor(min(numbers) / step + 1e-9) * step, math.ceil(max(numbers) / step - 1e-9) * step
    high = high if high > low else low + step
    left, right, top, pitch = max(90.0, CHARACTER * max(min(len(row[0]), MAX_LABEL) for row in rows) + 16), 142, 8, 27
    width, bottom = 1000, top + pitch * len(rows)

    def place(number: float) -> float:
        return left + (width - left - right) * (number - low) / (high - low)

    body = []
    for i in range(round((high - low) / step) + 1):
        tick = low + i * step
        body += [line(place(tick), top, place(tick), bottom, LINE)]
        body += [
            text(place(tick), bottom + 17, format_number(tick, 1 if step in (0.1, 0.2, 0.5, 1.0) else 2), "middle")
        ]
    if chance is not None:
        body.append(line(place(chance), top, place(chance), bottom, SOFT, dash="3 4"))
    for i, (name, value, lower, upper, highlighted) in enumerate(rows):
        y, color = top + pitch * (i + 0.5), FACTUAL if highlighted else PLAIN
        body.append(text(left - 14, y + 4, shorten(name), "end", INK, 600 if highlighted else 400))
        said = format_number(float(value))
        if math.isfinite(lower) and math.isfinite(upper):
            body.append(line(place(lower), y, place(upper), y, color, 2))
            body += [line(place(end), y - 4, place(end), y + 4, color, 2) for end in (lower, upper)]
            said += f" [{format_number(float(lower))}, {format_number(float(upper))}]"
        if math.isfinite(value):
            body.append(
                f'<circle cx="{place(value):.1f}" cy="{y:.1f}" r="4.5" style="fill:{color}">'
                f"<title>{escape(name)}: {said}</title></circle>"
            )
        body.append(text(width, y + 4, said, "end", INK if highlighted else SOFT))
    body.append(text(left + (width - left - right) / 2, bottom + 36, label, "middle"))
    return svg(width, bottom + 44, body, f"{label} of {len(rows)} methods with confidence intervals")


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold between distinct scores, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(labels[order])[last_of_ties]
    misses = last_of_ties + 1 - hits
    return np.append(0.0, misses / misses[-1]), np.append(0.0, hits / hits[-1])


def roc_plot(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Markup:
    """ROC curves of up to six methods, `name: (false positive rates, true positive rates)`."""
    size, left, top = 380, 46, 8
    height = top + size + 52 + 19 * len(curves)
    body = []
    for i in range(5):
        rate = i / 4
        x, y = left + size * rate, top + size * (1 - rate)
        body += [line(x, top, x, top + size, LINE), line(left, y, left + size, y, LINE)]
        body += [text(x, top + size + 17, f"{rate:g}", "middle"), text(left - 8, y + 4, f"{rate:g}", "end")]
    body.append(line(left, top + size, left + size, top, SOFT, dash="3 4"))
    body.append(text(left + size / 2, top + size + 34, "false positive rate", "middle"))
    middle = top + size / 2
    body.append(f'<g transform="rotate(-90 11 {middle:g})">{text(11, middle, "true positive rate", "middle")}</g>')
    for i, (name, (false_rates, true_rates)) in enumerate(curves.items()):
        kept = np.unique(np.linspace(0, len(false_rates) - 1, MAX_CURVE_POINTS).round().astype(int))
        points = " ".join(
            f"{left + size * x:.1f},{top + size * (1 - y):.1f}"
            for x, y in zip(false_rates[kept], true_rates[kept], strict=True)
        )
        color, y = SERIES[i % len(SERIES)], top + size + 60 + 19 * i
        width = 2.4 if i == 0 else 1.5
        body.append(f'<polyline points="{points}" style="fill:none;stroke:{color};stroke-width:{width}"/>')
        body += [line(left, y - 4, left + 20, y - 4, color, 3), text(left + 28, y, shorten(name, 44), color=INK)]
    return svg(left + size + 14, height, body, f"ROC curves of {', '.join(curves)}")


def score_histogram(labels: np.ndarray, scores: np.ndarray, bins: int = 24) -> Markup:
    """Histograms of scores, one per label, each as a share of its label's texts; orange is label 1."""
    width, height, left, top = 420, 220, 46, 30
    low, high = float(min(scores.min(), 0.0)), float(max(scores.max(), 1.0))
    shares = [
        np.histogram(scores[labels == label], bins, (low, high))[0] / (labels == label).sum() for label in (0, 1)
    ]
    tallest = max(0.01, *(float(share.max()) for share in shares))
    right, floor = width - 12, top + height
    body = []
    for i in range(5):
        x = left + (right - left) * i / 4
        body += [
            line(x, floor, x, floor + 4, SOFT),
            text(x, floor + 18, f"{low + (high - low) * i / 4:.3g}", "middle"),
        ]
    for fraction in (0.5, 1.0):
        y = floor - height * fraction
        body += [line(left, y, right, y, LINE), text(left - 8, y + 4, f"{tallest * fraction:.0%}", "end")]
    for share, color in zip(shares, (FACTUAL, HALLUCINATED), strict=True):
        ys = np.repeat(floor - height * share / tallest, 2)
        xs = np.repeat(np.linspace(left, right, bins + 1), 2)[1:-1]
        path = f"M{left},{floor} " + " ".join(f"L{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        body.append(
            f'<path d="{path} L{right},{floor} Z" '
            f'style="fill:{color};fill-opacity:.2;stroke:{color};stroke-width:1.5"/>'
        )
    body.append(line(left, floor, right, floor, SOFT))
    for x, color, name in ((left, FACTUAL, "true"), (left + 70, HALLUCINATED, "hallucinated")):
        body.append(f'<rect x="{x}" y="6" width="11" height="11" rx="2" style="fill:{color}"/>')
        body.append(text(x + 17, 16, name, color=INK))
    body.append(text((left + right) / 2, floor + 36, "score", "middle"))
    return svg(width, floor + 44, body, "Scores of true and of hallucinated answers")
