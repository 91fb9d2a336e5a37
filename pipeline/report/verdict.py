"""Write the first line of a report: which conclusions about the generated cells the intervals allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.rows import MetricRow
from scldm.metrics.distribution.true_process import PROCESS, TruthScores

# Groups that compare distributions. Every class has label rows of its own, and memorisation is a part of its own.
JUDGED = ("expression", "cells", "distance", "two-sample", "conditional")


@dataclass(frozen=True)
class Count:
    """Metrics by what their intervals allow to say of generated cells and another candidate."""

    name: str
    nearer: int  # generated cells are nearer to real ones
    farther: int
    not_told_apart: int

    @property
    def told_apart(self) -> int:
        """Metrics that tell the two apart."""
        return self.nearer + self.farther

    @property
    def text(self) -> str:
        """The count in words."""
        if not self.told_apart:
            return f"{self.name} (no metric tells the two apart)"
        return f"{self.name} ({self.nearer} of {self.told_apart} metrics)"


def verdict(
    rows: Sequence[MetricRow],
    yardsticks: Sequence[str],
    chance: Mapping[str, float],
    truth: TruthScores | None = None,
    *,
    changed: bool = False,
) -> str:
    """Return the verdict: which baselines generated cells beat, how near they are to real cells, labels, copies.

    Args:
        yardsticks: Baselines and candidates to compare with.
        chance: Share of the most frequent class of each label.
        truth: Figures against the process that synthetic cells come from, if it is known.
        changed: Whether the generated cells are measured ones whose counts were changed.
    """
    judged = [row for row in rows if row.score.group in JUDGED]
    counts = [count for name in yardsticks if (count := _against(judged, name)) is not None]
    parts = [_standing(counts)] if counts else []
    floors = [row.at_floor for row in judged if row.at_floor is not None]
    if floors:
        parts.append(f"{sum(floors)} of {len(floors)} metrics do not tell generated cells from real ones")
    parts += _beside_the_process(truth)
    found = {row.name: row for row in rows}
    for name, share in chance.items():
        row = found[f"label_accuracy.{name}"]
        real = "" if row.floor is None else f"{row.floor.value:.1%} of held-out real ones, "
        parts.append(
            f"a kNN classifier trained on real cells recovers {name} of {row.score.value:.1%} of generated cells "
            f"({real}chance {share:.1%})"
        )
    if changed:
        parts.append(
            "these cells are measured ones whose counts were changed, so that their distance to training cells does "
            "not say whether they are copies"
        )
    elif "memorisation_share" in found:
        parts.append(_copies(found["memorisation_share"], found["memorisation_ratio"]))
    return " ".join(f"{text[:1].upper()}{text[1:]}." for text in parts)


def _against(rows: Sequence[MetricRow], name: str) -> Count | None:
    found = Counter(said for row in rows if (said := row.against(name)) is not None)
    return Count(name, found["nearer"], found["farther"], found["not told apart"]) if found else None


def _standing(counts: Sequence[Count]) -> str:
    """Say which baselines generated cells are nearer to real ones than, by most of the metrics that tell them apart."""
    beaten = [count for count in counts if count.nearer > count.farther]
    others = [count for count in counts if count.nearer <= count.farther]
    by = "by most of the metrics that tell them apart (95 % intervals)"
    if not beaten:
        return f"{by}, generated cells are not nearer to real cells than {_listed(others)}"
    every = f"all {len(beaten)} baselines: " if not others and len(beaten) > 1 else ""
    rest = f", but not than {_listed(others)}" if others else ""
    return f"{by}, generated cells are nearer to real cells than {every}{_listed(beaten)}{rest}"


def _listed(counts: Sequence[Count]) -> str:
    texts = [count.text for count in counts]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _beside_the_process(truth: TruthScores | None) -> list[str]:
    """Return sentences on how near the true process generated cells and the VAE are."""
    if truth is None:
        return []
    own, made, real = truth.frechet, truth.frechet["generated"], truth.frechet["held-out"]
    others = ", ".join(
        f"{value:.1f} for {name}" for name, value in own.items() if name not in ("generated", "held-out")
    )
    texts = [
        f"the Fréchet distance to {truth.n_fresh:,} fresh cells of the process that the cells were drawn from is "
        f"{made:.1f} for generated cells, {real:.1f} for held-out real ones and {others}"
    ]
    if "the VAE" in truth.nll:
        by = ", ".join(f"{value:,.0f} {name}" for name, value in truth.nll.items() if name not in ("the VAE", PROCESS))
        texts.append(
            f"held-out counts have a negative log-likelihood of {truth.nll['the VAE']:,.0f} nats a cell under the VAE, "
            f"{truth.nll[PROCESS]:,.0f} under that process and {by}"
        )
    return texts


def copies_suspected(share: MetricRow) -> bool:
    """Return whether more generated cells than real ones sit next to a training cell."""
    low = share.score.interval[0] if share.score.interval else share.score.value
    usual = share.score.ideal if share.floor is None or share.floor.interval is None else share.floor.interval[1]
    return bool(low > max(usual, share.score.ideal))


def _copies(share: MetricRow, ratio: MetricRow) -> str:
    conclusion = (
        "more generated cells than real ones sit next to a training cell: they may be copies"
        if copies_suspected(share)
        else "no sign of copies of training cells"
    )
    return (
        f"{conclusion} ({share.score.value:.1%} nearer than 1 % of held-out cells are; median distance ratio "
        f"{ratio.score.value:.2f})"
    )
