"""Draw a row of the report's table as inline SVG: every candidate as a bar from the floor, with its interval.

Every row has its own axis: the vertical line is the floor's value, the pale band its 95 % interval. A bar ends at the
candidate's value, its whisker is the interval; a bar that leaves the axis ends in a triangle at the edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from scldm.metrics.score import Score

WIDTH, LINE, PAD = 190.0, 7.0, 4.0  # px
GENERATED, OTHERS = "#e07b2e", ("#6b7785", "#a3adb8", "#8d6cab", "#c9b48f", "#2f8f83", "#b0487a")


def colors(names: Mapping[str, object] | list[str]) -> dict[str, str]:
    """Return the color of each candidate, by its position."""
    others = [name for name in names if name not in ("generated", "floor")]
    return {"generated": GENERATED} | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def bar_svg(scores: Mapping[str, Score], palette: Mapping[str, str]) -> str:
    """Return the SVG of a row; "" if there is no floor. It holds numbers and colors only, no text from data.

    Args:
        scores: Scores by name: generated, floor, and the others.
        palette: Colors of all columns, see `colors`.
    """
    if "floor" not in scores or len(scores) < 2:
        return ""
    floor = scores["floor"]
    low, high = _axis(scores)
    at = lambda v: PAD + (WIDTH - 2 * PAD) * (min(max(v, low), high) - low) / (high - low)  # noqa: E731
    drawn = [name for name in palette if name in scores]
    height = LINE * len(drawn) + 2
    parts = [f'<svg width="{WIDTH:.0f}" height="{height:.0f}" role="img">']
    if floor.interval:
        a, b = map(at, floor.interval)
        parts.append(f'<rect x="{a:.1f}" y="0" width="{max(b - a, 1):.1f}" height="{height:.0f}" fill="#dfe8f3"/>')
    x0 = at(floor.value)
    for i, name in enumerate(drawn):
        parts += _bar(scores[name], palette[name], x0, at, (low, high), 1 + LINE * i)
    parts.append(
        f'<line x1="{x0:.1f}" x2="{x0:.1f}" y1="0" y2="{height:.0f}" stroke="#2f6db3" stroke-width="1.5"/></svg>'
    )
    return "".join(parts)


def _bar(
    score: Score, color: str, x0: float, at: Callable[[float], float], edges: tuple[float, float], y: float
) -> Iterator[str]:
    x, middle = at(score.value), y + LINE / 2 - 0.5
    size = f'width="{max(abs(x - x0), 0.8):.1f}" height="{LINE - 2:.0f}"'
    yield f'<rect x="{min(x, x0):.1f}" y="{y:.1f}" {size} fill="{color}"/>'
    if not edges[0] <= score.value <= edges[1]:
        tip, back = (WIDTH, WIDTH - PAD) if score.value > edges[1] else (0.0, PAD)
        yield f'<path d="M{back} {y:.1f}L{tip} {middle:.1f}L{back} {y + LINE - 2:.1f}Z" fill="{color}"/>'
    elif score.interval:
        a, b = map(at, score.interval)
        yield f'<path d="M{a:.1f} {middle:.1f}H{b:.1f}" stroke="#1d2733" stroke-width="1"/>'


def _axis(scores: Mapping[str, Score]) -> tuple[float, float]:
    """Return the ends of the axis, from the generated cells, the floor and the nearest baselines.

    A baseline that is far away does not flatten the rest.
    """
    floor = scores["floor"].value
    own = scores["generated"]
    reach = max(abs(end - floor) for end in (*(own.interval or ()), own.value))
    others = sorted(abs(s.value - floor) for name, s in scores.items() if name not in ("generated", "floor"))
    usual = others[len(others) // 2] if others else 0.0
    wide = max(1.15 * reach, 1.6 * usual, scores["floor"].half_width or 0.0, 1e-9 * max(abs(floor), 1.0))
    ends = [v for s in scores.values() for v in (s.value, *(s.interval or ()))]
    low, high = max(min(ends), floor - wide), min(max(ends), floor + wide)
    margin = 0.03 * max(high - low, 1e-12)
    return low - margin, high + margin
