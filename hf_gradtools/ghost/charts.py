"""Charts as plain geometry, for a template to draw: numbers in, percent of the chart's box out.

x runs from the left and y from the top, both in percent, so that a chart stretches to any screen while its labels,
which are text beside the shapes, keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


__all__ = ["Axis", "Chart", "Labels", "Unit", "bar_chart", "format_number", "histogram", "line_chart", "thin"]

MAX_POINTS = 120  # longer series are averaged over neighbours
MAX_HISTOGRAM_BARS = 40
OUTLIER_QUANTILE = 0.005
MISSING = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Unit:
    """A power of ten, and the decimals that go with it, in which numbers of one kind are short to read."""

    exponent: int = 0
    decimals: int = 0

    @classmethod
    def of(cls, numbers: Sequence[float] | np.ndarray, digits: int = 4) -> Unit:
        """The unit that writes the largest of the finite numbers with so many significant digits."""
        sizes = np.abs(np.asarray(numbers, dtype=np.float64))
        largest = float(sizes[np.isfinite(sizes)].max(initial=0.0))
        if largest == 0:
            return cls()
        order = math.floor(math.log10(largest))
        exponent = 0 if -2 <= order <= 4 else 3 * ((order + 1) // 3)  # 0.1 to 99.9
        return cls(exponent, max(0, digits - 1 - (order - exponent)))

    @property
    def suffix(self) -> str:
        return f"×10{str(self.exponent).translate(SUPERSCRIPTS)}" if self.exponent else ""

    def format(self, number: float) -> str:
        """The number in this unit, without the suffix."""
        if not math.isfinite(number):
            return MISSING
        return f"{number / 10.0**self.exponent:,.{self.decimals}f}".replace("-", "−")


def format_number(number: Any, digits: int = 4) -> str:
    """A number as a reader likes it: `1,204`, `−0.0312`, `1.20×10⁻⁷`. What is no number becomes its text."""
    if isinstance(number, int | np.integer) and not isinstance(number, bool):
        return f"{number:,}".replace("-", "−")
    if not isinstance(number, float | np.floating):
        return str(number)
    if number == 0 or not math.isfinite(number):
        return Unit().format(float(number))
    order = math.floor(math.log10(abs(float(number))))
    unit = Unit(0, max(0, digits - 1 - order)) if -4 < order < 5 else Unit(order, digits - 1)
    return unit.format(float(number)) + unit.suffix


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with ticks at multiples of `step`."""

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, numbers: np.ndarray, *, ticks: int = 4, tight: bool = False, whole: bool = False) -> Axis:
        """Covers the finite numbers; it ends at ticks unless `tight`, and `whole` has none between integers."""
        finite = numbers[np.isfinite(numbers)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
        power = 10.0 ** math.floor(math.log10((high - low) / ticks))
        step = next(power * nice for nice in (1, 2, 5, 10) if power * nice * ticks >= (high - low) * 0.999)
        step = max(step, 1.0) if whole else step
        if not tight:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(low, high, step)

    def place(self, numbers: Any) -> Any:
        """How far along the axis each number is, in percent."""
        return 100 * (numbers - self.low) / (self.high - self.low)

    def ticks(self) -> tuple[list[tuple[float, str]], str]:
        """(percent, label) of each tick, and the suffix of the labels' unit."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        numbers = [i * self.step for i in range(first, last + 1)]
        exponent = Unit.of([self.low, self.high]).exponent
        unit = Unit(exponent, max(0, exponent - math.floor(math.log10(self.step) + 1e-9)))
        return [(float(self.place(number)), unit.format(number)) for number in numbers], unit.suffix


@dataclass(frozen=True)
class Labels:
    """What stands around a chart."""

    title: str
    note: str = ""
    x: str = "step"
    y: str = ""


@dataclass(frozen=True)
class Chart:
    """What a template draws."""

    labels: Labels
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    hovers: list[tuple[float, float, str]]  # left, width, text of the tooltip
    marks: list[float]  # x of vertical lines
    zero: float | None = None  # where y = 0 is, if it deserves a line
    bars: list[tuple[float, float, float, float, str]] = field(default_factory=list)  # left, top, width, height, kind
    line: str = ""  # data of an SVG path
    area: str = ""


def bar_chart(
    edges: np.ndarray,
    heights: np.ndarray,
    tips: Sequence[str],
    labels: Labels,
    *,
    kinds: Sequence[str] | None = None,
    marks: Sequence[float] = (),
) -> Chart:
    """Bars from zero.

    Args:
        edges (`np.ndarray`): `[n + 1]` where bars begin and end.
        heights (`np.ndarray`): `[n]`; one that is not finite has no bar.
        tips (`Sequence[str]`): `[n]` tooltips.
        labels (`Labels`): what stands around the chart.
        kinds (`Sequence[str]`, *optional*): `[n]` CSS classes.
        marks (`Sequence[float]`): x of vertical lines.
    """
    x = Axis.over(edges, ticks=8, tight=True, whole=labels.x != "value")
    y = Axis.over(np.append(heights, 0.0), whole=np.issubdtype(heights.dtype, np.integer))
    zero, lefts, tops = float(100 - y.place(0.0)), x.place(edges), 100 - y.place(heights)
    bars = [
        (left, min(top, zero), right - left, abs(top - zero), kind)
        for left, right, top, kind in zip(lefts[:-1], lefts[1:], tops, kinds or ["plain"] * len(tops), strict=True)
        if math.isfinite(top)
    ]
    return _chart(x, y, edges, tips, labels, marks, bars=bars, zero=zero)


def line_chart(
    xs: np.ndarray,
    ys: np.ndarray,
    tips: Sequence[str],
    labels: Labels,
    *,
    from_zero: bool = False,
    marks: Sequence[float] = (),
) -> Chart:
    """A line with gaps where y is not finite.

    Args:
        xs (`np.ndarray`): `[n]`, rising.
        ys (`np.ndarray`): `[n]`.
        tips (`Sequence[str]`): `[n]` tooltips.
        labels (`Labels`): what stands around the chart.
        from_zero (`bool`, defaults to `False`): shade what is between the line and zero.
        marks (`Sequence[float]`): x of vertical lines.
    """
    edges = cell_edges(xs)
    x = Axis.over(edges, ticks=6, tight=True, whole=True)
    y = Axis.over(np.append(ys, 0.0) if from_zero else ys)
    lefts, tops = x.place(xs), 100 - y.place(ys)
    solid = np.isfinite(tops)
    starts = solid & ~np.insert(solid[:-1], 0, False)
    line = " ".join(f"{'M' if starts[i] else 'L'}{lefts[i]:.2f} {tops[i]:.2f}" for i in np.flatnonzero(solid))
    if not from_zero or not line:
        return _chart(x, y, edges, tips, labels, marks, line=line)
    zero, ends = float(100 - y.place(0.0)), lefts[solid][[0, -1]]
    area = f"M{ends[0]:.2f} {zero:.2f} {line.replace('M', 'L')} L{ends[1]:.2f} {zero:.2f} Z"
    return _chart(x, y, edges, tips, labels, marks, line=line, area=area, zero=zero)


def histogram(values: np.ndarray, labels: Labels) -> Chart:
    """Counts of the finite values; bars below zero are of kind `helps`, those above `harms`."""
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [OUTLIER_QUANTILE, 1 - OUTLIER_QUANTILE]) if len(values) else (0.0, 0.0)
    bars = min(MAX_HISTOGRAM_BARS, max(8, round(2 * len(values) ** 0.5)))
    width = float(high - low) / (bars - 2) or float(abs(high)) or 1.0
    slots = np.floor(np.clip(values, low, high) / width).astype(np.int64)
    first, last = int(slots.min(initial=0)), int(slots.max(initial=0))
    counts = np.bincount(slots - first, minlength=last - first + 1)
    edges = np.arange(first, last + 2) * width
    if outside := int(((values < edges[0]) | (values > edges[-1])).sum()):
        labels = replace(labels, note=f"{labels.note}; {outside:,} beyond the ends are counted in the outermost bars")
    unit = Unit.of(edges, 3)
    tips = [
        f"{unit.format(left)} to {unit.format(right)} {unit.suffix}: {count:,} samples"
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return bar_chart(
        edges, counts, tips, labels, kinds=["helps" if slot < 0 else "harms" for slot in range(first, last + 1)]
    )


def thin(xs: np.ndarray, ys: np.ndarray, *, keep_last: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points: neighbours are averaged, or the last of them stays."""
    parts = np.array_split(np.arange(len(xs)), min(len(xs), MAX_POINTS))
    if keep_last:
        ends = [part[-1] for part in parts]
        return xs[ends], ys[ends]
    means = [ys[part][np.isfinite(ys[part])].mean() if np.isfinite(ys[part]).any() else np.nan for part in parts]
    return np.array([xs[part].mean() for part in parts]), np.array(means)


def cell_edges(xs: np.ndarray) -> np.ndarray:
    """The `[n + 1]` borders of the cells around rising points `[n]`, halfway between neighbours."""
    first, last = (xs[1] - xs[0], xs[-1] - xs[-2]) if len(xs) > 1 else (1.0, 1.0)
    return np.concatenate([[xs[0] - first / 2], (xs[1:] + xs[:-1]) / 2, [xs[-1] + last / 2]])


def _chart(
    x: Axis,
    y: Axis,
    edges: np.ndarray,
    tips: Sequence[str],
    labels: Labels,
    marks: Sequence[float],
    **shapes: Any,
) -> Chart:
    (x_ticks, x_suffix), (y_ticks, y_suffix) = x.ticks(), y.ticks()
    lefts = x.place(edges)
    return Chart(
        labels=replace(labels, x=f"{labels.x} {x_suffix}".strip(), y=f"{labels.y} {y_suffix}".strip()),
        x_ticks=x_ticks,
        y_ticks=[(100 - place, label) for place, label in y_ticks],
        hovers=list(zip(lefts[:-1].tolist(), np.diff(lefts).tolist(), tips, strict=True)),
        marks=[float(x.place(mark)) for mark in marks],
        **shapes,
    )
