"""Tracks of one text as a picture: layers from left to right, a lane per track, thick where the activation is high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from hf_gradtools.ghosttrack.report.charts import FACTUAL, HALLUCINATED, INK, LINE, format_number, line, svg, text


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.tracking.tracking import Tracks

__all__ = ["Point", "Track", "plot_tracks", "points_of"]

Point = tuple[int, int, float, int]  # layer, feature, activation, position
Track = Sequence[Point]

LEFT, RIGHT, TOP, LANE = 92, 22, 14, 22
THINNEST, THICKEST, FAINTEST = 1.5, 10.0, 0.35


def points_of(tracks: Tracks, text: int) -> tuple[list[Track], list[int]]:
    """The tracks of one text as [`plot_tracks`] takes them, and the layers of its axis.

    A layer is the number of its block where all hookpoints are outputs of blocks in ascending order, else its place.
    """
    from hf_gradtools.sae.hookpoints import BLOCK

    names = tracks.hypotheses.layers
    matches = [BLOCK.fullmatch(name) for name in names]
    numbers = [int(match[1]) for match in matches if match and not match[2]]
    if len(numbers) < len(names) or sorted(set(numbers)) != numbers:
        numbers = list(range(len(names)))
    place = dict(zip(names, numbers, strict=True))
    points = [
        [(place[step.layer], step.feature, step.activation, step.position) for step in track.steps]
        for track in tracks.of_text(text)
    ]
    return points, numbers


def plot_tracks(
    tracks: Sequence[Track],
    *,
    layers: Sequence[int] | None = None,
    max_tracks: int = 12,
    width: int = 1000,
    title: str = "Features tracked across layers",
) -> Markup:
    """Draws the strongest tracks; a ring is a birth, a cross a death, a tooltip tells each point's numbers.

    Args:
        tracks (`Sequence`): each a sequence of (layer, feature, activation, position), layers ascending.
        layers (`Sequence[int]`, *optional*): the layers of the axis, ascending; a track that reaches the last one does
            not die. By default those of the tracks.
        max_tracks (`int`, defaults to 12): drawn, those with the largest sum of activations; in order of birth.
        width (`int`, defaults to 1000): pixels; the picture shrinks with its place.
        title (`str`): read out in place of the picture.

    Returns:
        `Markup`: SVG, a `str` that stands by itself in a page, a notebook or a file.

    Raises:
        ValueError: a track has no points, names a layer twice or descends, or a layer is not in `layers`.
    """
    if max_tracks < 1:
        raise ValueError(f"max_tracks={max_tracks} draws nothing; need at least 1.")
    axis = sorted({point[0] for track in tracks for point in track}) if layers is None else list(layers)
    _check(tracks, axis)
    if not tracks or not axis:
        return svg(width, 40, [text(0, 24, "No feature was tracked.")], title)
    strongest = sorted(tracks, key=lambda track: -sum(point[2] for point in track))[:max_tracks]
    strongest.sort(key=lambda track: (track[0][0], -max(point[2] for point in track)))
    xs = {layer: LEFT + (width - LEFT - RIGHT) * (i + 0.5) / len(axis) for i, layer in enumerate(axis)}
    floor = TOP + LANE * len(strongest)
    body = _axis(axis, xs, floor, (width - LEFT - RIGHT) / len(axis))
    largest = max(point[2] for track in strongest for point in track)
    for i, track in enumerate(strongest):
        body += _lane(track, TOP + LANE * (i + 0.5), xs, largest, axis[-1])
    body += _legend(floor + 56, len(strongest), len(tracks), largest)
    return svg(width, floor + 64, body, f"{title}: {len(strongest)} of {len(tracks)} tracks over {len(axis)} layers")


def _check(tracks: Sequence[Track], axis: Sequence[int]) -> None:
    for i, track in enumerate(tracks):
        path = [point[0] for point in track]
        if not path:
            raise ValueError(f"tracks[{i}] has no points; need at least 1. Leave it out.")
        if any(after <= before for before, after in zip(path[:-1], path[1:], strict=True)):
            raise ValueError(f"tracks[{i}] goes through layers {path}; need ascending ones.")
        if not set(path) <= set(axis):
            raise ValueError(f"tracks[{i}] goes through layers {path}, which are not all in layers={axis}.")
        if not all(math.isfinite(point[2]) for point in track):
            raise ValueError(f"tracks[{i}] has an activation that is not finite.")


def _axis(axis: Sequence[int], xs: dict[int, float], floor: float, pitch: float) -> list[str]:
    every = max(1, math.ceil(22 / pitch))
    body = [line(xs[layer], TOP, xs[layer], floor, LINE) for layer in axis]
    body += [text(xs[layer], floor + 17, str(layer), "middle") for layer in axis[::every]]
    return [*body, text(LEFT - 10, floor + 17, "layer", "end"), text(LEFT - 10, TOP - 4, "feature", "end")]


def _lane(track: Track, y: float, xs: dict[int, float], largest: float, last_layer: int) -> list[str]:
    def size(activation: float) -> float:
        return math.sqrt(max(activation, 0.0) / largest) if largest > 0 else 0.0

    body = []
    for before, after in zip(track[:-1], track[1:], strict=True):
        strength = size((before[2] + after[2]) / 2)
        stroke = f"stroke:{FACTUAL};stroke-width:{THINNEST + (THICKEST - THINNEST) * strength:.2f}"
        opacity = FAINTEST + (1 - FAINTEST) * strength
        body.append(
            f'<line x1="{xs[before[0]]:.1f}" y1="{y:.1f}" x2="{xs[after[0]]:.1f}" y2="{y:.1f}" '
            f'style="{stroke};stroke-opacity:{opacity:.2f}"/>'
        )
    birth, death = track[0], track[-1]
    body.append(_ring(xs[birth[0]], y))
    if death[0] != last_layer:
        body.append(_cross(xs[death[0]] + (8 if len(track) == 1 else 0), y))
    for layer, feature, activation, position in track:
        told = f"layer {layer} · feature {feature} · activation {format_number(float(activation))} · token {position}"
        body.append(
            f'<circle cx="{xs[layer]:.1f}" cy="{y:.1f}" r="9" style="fill:transparent">'
            f"<title>{escape(told)}</title></circle>"
        )
    peak = max(track, key=lambda point: point[2])
    return [*body, text(LEFT - 10, y + 4, f"{peak[1]} @ {peak[0]}", "end", INK)]


def _ring(x: float, y: float) -> str:
    fill = "var(--card,#fff)"
    return (
        f'<circle class="birth" cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:{fill};stroke:{FACTUAL};stroke-width:2"/>'
    )


def _cross(x: float, y: float) -> str:
    path = f"M{x - 4:.1f},{y - 4:.1f} l8,8 m0,-8 l-8,8"
    return f'<path class="death" d="{path}" style="fill:none;stroke:{HALLUCINATED};stroke-width:2"/>'


def _legend(y: float, shown: int, of: int, largest: float) -> list[str]:
    many = f"{shown} of {of} tracks" if of > shown else f"{of} track{'s' * (of != 1)}"
    body = [
        _ring(LEFT + 6, y - 4).replace(' class="birth"', ""),
        text(LEFT + 16, y, "birth"),
        _cross(LEFT + 66, y - 4).replace(' class="death"', ""),
        text(LEFT + 76, y, "death"),
        line(LEFT + 124, y - 4, LEFT + 156, y - 4, FACTUAL, THICKEST),
        text(LEFT + 164, y, f"activation {format_number(float(largest), 2)}"),
        text(LEFT + 300, y, f"{many}, named by their strongest feature @ layer"),
    ]
    return body
