"""What the quality benchmark prints: a table of candidates, and the goals with a verdict each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from harness import Row
from rich.console import Console
from rich.table import Table

from scldm.metrics.score import departure

DISTANCES = ("w2", "mmd2", "frechet", "auroc")
SHOWN = (
    *("w1", "w2", "mmd2", "mmd2_median", "energy", "frechet", "auroc", "one_nn_accuracy"),
    *("precision", "recall", "density", "coverage", "gene_mean_r2", "gene_variance_r2", "gene_zero_fraction_r2"),
    *("library_size_ks", "genes_per_cell_ks"),
)
RIVALS = ("per-label NB", "scVI prior")
POINTS = 0.05  # of label agreement


@dataclass(frozen=True)
class Judged:
    """A goal: ours nearer the floor than the rival, or label agreement within five points of real cells."""

    goal: str
    ours: float
    rival: float
    floor: float
    met: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(result: Any, label: str) -> list[Judged]:
    """Goals of issue 7, each with the numbers behind it; of rivals that are there."""
    out = []
    for name in DISTANCES:
        ours, floor = result.generated[name], result.floor[name]
        for rival in RIVALS:
            if rival in result.baselines:
                other = result.baselines[rival][name]
                met = departure(ours, floor) < departure(other, floor)
                out.append(Judged(f"{name} nearer the floor than {rival}", ours.value, other.value, floor.value, met))
    key = f"label_accuracy.{label}"
    ours, real = result.generated[key].value, result.floor[key].value
    out.append(
        Judged(f"kNN label agreement ({label}) within 5 points of real", ours, real, real, abs(ours - real) <= POINTS)
    )
    return out


def as_rows(found: Mapping[str, Any]) -> list[Row]:
    """Rows of `benchmarks/results/quality.json`, of what `quality.py` found for each file; one training each.

    vs_floor: ours, the floor, and floor / ours. vs_scvi, vs_nb: ours, theirs, and how many times as far from the floor
    they are. label_agreement_gap: of kNN, in shares, beside the five points that are allowed.
    """
    out = []
    for data, part in found.items():
        for short, name in {"w2": "w2", "mmd": "mmd2", "frechet": "frechet", "auroc": "auroc"}.items():
            row = part["rows"][name]
            ours, floor = row["ours"], row["floor"]
            pairs = {"floor": (floor, floor / ours)}
            for who, rival in (("nb", RIVALS[0]), ("scvi", RIVALS[1])):
                if rival in row:
                    pairs[who] = (row[rival], abs(row[rival] - floor) / max(abs(ours - floor), 1e-12))
            out += [_row(f"{data}.{short}_vs_{who}", ours, *pair) for who, pair in pairs.items()]
        gap = next(g for g in part["goals"] if "label agreement" in g["goal"])
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
        if row.name in SHOWN or row.name.startswith(("label_accuracy.", "reconstruction_")):
            others = [row.floor, *(row.baselines.get(b) for b in result.baselines)]
            table.add_row(row.score.title, *("–" if s is None else f"{s.value:.4g}" for s in (row.score, *others)))
    console.print(table)
    for j in judged:
        console.print(
            f"{'met  ' if j.met else 'NOT MET'} {j.goal}: {j.ours:.4g} against {j.rival:.4g}, floor {j.floor:.4g}"
        )
