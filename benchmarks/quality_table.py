"""What the quality benchmark prints: a table of candidates, and the goals with a verdict each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness import Row
from rich.console import Console
from rich.table import Table

from scldm.metrics.score import departure
from scldm.metrics.score import judge as nearer

DISTANCES = ("w2", "mmd2", "frechet", "auroc")
SHOWN = (
    *("w1", "w2", "mmd2", "mmd2_median", "energy", "frechet", "auroc", "one_nn_accuracy"),
    *("precision", "recall", "density", "coverage", "gene_mean_r2", "gene_variance_r2", "gene_zero_fraction_r2"),
    *("library_size_ks", "genes_per_cell_ks"),
)
RIVALS = {"nb": "per-label NB", "scvi": "scVI prior", "scvi_per_label": "scVI per label"}
CLASSIFIERS = {"label_accuracy": "kNN", "label_logistic_accuracy": "logistic"}
POINTS = 0.05  # of label agreement


@dataclass(frozen=True)
class Judged:
    """A goal: ours nearer the floor than the rival, or label agreement within five points of real cells.

    `met` is of the values; `sure` is what the 95 % intervals of `evaluate` say: "nearer", "farther" or "not told apart"
    (of other cells of the same models, not of other trainings).
    """

    goal: str
    ours: float
    rival: float
    floor: float
    met: bool
    sure: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(result: Any, labels: Sequence[str]) -> list[Judged]:
    """Goals of issue 7, each with the numbers behind it; of rivals that are there, and of every label."""
    out = []
    for name in DISTANCES:
        ours, floor = result.generated[name], result.floor[name]
        for rival in RIVALS.values():
            if rival in result.baselines:
                other = result.baselines[rival][name]
                met, sure = (
                    departure(ours, floor) < departure(other, floor),
                    nearer(ours, other, floor) or "no interval",
                )
                out.append(
                    Judged(f"{name} nearer the floor than {rival}", ours.value, other.value, floor.value, met, sure)
                )
    for label in labels:
        for key, kind in CLASSIFIERS.items():
            ours, real = result.generated[f"{key}.{label}"], result.floor[f"{key}.{label}"]
            off, width = departure(ours, real), ours.half_width or 0.0
            sure = "nearer" if off + width <= POINTS else "farther" if off - width > POINTS else "not told apart"
            goal = f"{kind} label agreement ({label}) within 5 points of real"
            out.append(Judged(goal, ours.value, real.value, real.value, off <= POINTS, sure))
    return out


def as_rows(found: Mapping[str, Any]) -> list[Row]:
    """Rows of `benchmarks/results/quality.json`, of what `quality.py` found for each file; one training each.

    vs_floor: ours, the floor, and floor / ours. vs_nb, vs_scvi, …: ours, theirs, and how many times as far from the
    floor they are; ours counts as no nearer than half of its own interval.
    """
    out = []
    for data, part in found.items():
        for short, name in {"w2": "w2", "mmd": "mmd2", "frechet": "frechet", "auroc": "auroc"}.items():
            row = part["rows"][name]
            ours, floor = row["ours"]["value"], row["floor"]["value"]
            least = max(abs(ours - floor), row["ours"]["half_width"] or 0.0)
            out.append(_row(f"{data}.{short}_vs_floor", ours, floor, floor / ours))
            for who, rival in RIVALS.items():
                if rival in row:
                    theirs = row[rival]["value"]
                    out.append(_row(f"{data}.{short}_vs_{who}", ours, theirs, abs(theirs - floor) / least))
        gap = next(g for g in part["goals"] if "kNN label agreement" in g["goal"])
        off = abs(gap["floor"] - gap["ours"])
        out.append(_row(f"{data}.label_agreement_gap", off, POINTS, POINTS / max(off, 1e-12)))
    return out


def _row(name: str, value: float, baseline: float, ratio: float) -> Row:
    return Row(name, value, "score", baseline, ratio, 1, (ratio, ratio))


def print_table(name: str, result: Any, judged: list[Judged]) -> None:
    console = Console(width=140)
    table = Table(title=f"{name}: generated cells against {result.parts.real.n_cells:,} held-out real ones")
    table.add_column("metric")
    for column in ("scLDM", "floor", *result.baselines):
        table.add_column(column, justify="right")
    for row in result.rows:
        if row.name in SHOWN or row.name.startswith(("label_accuracy.", "label_logistic_accuracy.", "reconstruction_")):
            others = [row.floor, *(row.baselines.get(b) for b in result.baselines)]
            table.add_row(row.score.title, *("–" if s is None else f"{s.value:.4g}" for s in (row.score, *others)))
    console.print(table)
    for j in judged:
        console.print(
            f"{'met  ' if j.met else 'NOT MET'} {j.goal}: {j.ours:.4g} against {j.rival:.4g}, floor {j.floor:.4g} "
            f"({j.sure} by the intervals)"
        )
