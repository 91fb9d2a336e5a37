"""The first line of a report: what may be said of the generated cells, and what may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.report.rows import MetricRow

# Rows that compare distributions. Every class has label rows of its own, and memorisation is said apart.
JUDGED = ("expression", "cells", "distance", "two-sample", "conditional")


def verdict(rows: Sequence[MetricRow], yardsticks: Sequence[str], chance: Mapping[str, float]) -> str:
    """Counts of metrics, by what the intervals permit; label agreement; copies."""
    judged = [row for row in rows if row.score.group in JUDGED]
    words = [said for name in yardsticks if (said := _against(judged, name))]
    floors = [row.at_floor for row in judged if row.at_floor is not None]
    if floors:
        words.append(f"not told from real cells by {sum(floors)} of {len(floors)} metrics")
    found = {row.name: row for row in rows}
    for name, share in chance.items():
        row = found[f"label_accuracy.{name}"]
        real = "" if row.floor is None else f"{row.floor.value:.1%} of held-out real ones, "
        words.append(
            f"kNN trained on real cells recovers {name} of {row.score.value:.1%} of generated cells ({real}chance "
            f"{share:.1%})"
        )
    if "memorisation_share" in found:
        words.append(_copies(found["memorisation_share"], found["memorisation_ratio"]))
    text = "; ".join(words)
    return text[:1].upper() + text[1:] + "."


def _against(rows: Sequence[MetricRow], name: str) -> str | None:
    counts = Counter(found for row in rows if (found := row.against(name)) is not None)
    total = sum(counts.values())
    if not total:
        return None
    return (
        f"nearer to the real-vs-real floor than {name} in {counts['nearer']} of {total} metrics, farther in "
        f"{counts['farther']}, not told apart in {counts['not told apart']} (95 % intervals)"
    )


def _copies(share: MetricRow, ratio: MetricRow) -> str:
    low = share.score.interval[0] if share.score.interval else share.score.value
    usual = share.score.ideal if share.floor is None or share.floor.interval is None else share.floor.interval[1]
    said = (
        "more generated cells than real ones sit next to a training cell: they may be copies"
        if low > max(usual, share.score.ideal)
        else "no sign of copies of training cells"
    )
    return (
        f"{said} ({share.score.value:.1%} nearer than 1 % of held-out cells are; median distance ratio "
        f"{ratio.score.value:.2f})"
    )
