"""Write the first line of a report: which conclusions about the generated cells the intervals allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.report.rows import MetricRow

# Groups that compare distributions. Every class has label rows of its own, and memorisation is a part of its own.
JUDGED = ("expression", "cells", "distance", "two-sample", "conditional")


def verdict(rows: Sequence[MetricRow], yardsticks: Sequence[str], chance: Mapping[str, float]) -> str:
    """Return the verdict: counts of metrics by what the intervals allow, label agreement, copies of training cells.

    Args:
        yardsticks: Baselines and candidates to compare with.
        chance: Share of the most frequent class of each label.
    """
    judged = [row for row in rows if row.score.group in JUDGED]
    parts = [text for name in yardsticks if (text := _against(judged, name))]
    floors = [row.at_floor for row in judged if row.at_floor is not None]
    if floors:
        parts.append(f"not told from real cells by {sum(floors)} of {len(floors)} metrics")
    found = {row.name: row for row in rows}
    for name, share in chance.items():
        row = found[f"label_accuracy.{name}"]
        real = "" if row.floor is None else f"{row.floor.value:.1%} of held-out real ones, "
        parts.append(
            f"kNN trained on real cells recovers {name} of {row.score.value:.1%} of generated cells ({real}chance "
            f"{share:.1%})"
        )
    if "memorisation_share" in found:
        parts.append(_copies(found["memorisation_share"], found["memorisation_ratio"]))
    text = "; ".join(parts)
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
    conclusion = (
        "more generated cells than real ones sit next to a training cell: they may be copies"
        if low > max(usual, share.score.ideal)
        else "no sign of copies of training cells"
    )
    return (
        f"{conclusion} ({share.score.value:.1%} nearer than 1 % of held-out cells are; median distance ratio "
        f"{ratio.score.value:.2f})"
    )
