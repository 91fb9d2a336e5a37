"""What limits a prediction of an unseen combination: the mean, or how cells are drawn around it?

Every free answer of `perturbation.py` uses a mean that other contexts give. Here the combination's own measured mean
shift is given away, and cells are made from the context's control cells in three ways:

    log shift       control cells + the shift in log1p CP10k, without noise
    Poisson gain    counts that are changed by one factor a gene, matched to the shift; a Poisson number is added
    NB gain         the same, and as much is added as the cell's own count makes likely (`changed_counts`)

No model is trained. An energy distance near 0, that of the floor, says that nothing but the mean was missing.

    python benchmarks/perturbation_limit.py --json benchmarks/results/perturbation_limit.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import perturbation_screens
import scipy.sparse as sp
from harness import Row, report

from scldm.generation.draws.change import Change
from scldm.generation.draws.matched_mean import draw_changed, matched_factors
from scldm.metrics.baselines import LabelBaseline
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.perturbation.combinations import CombinationJudge
from scldm.metrics.perturbation.free_answers import SHIFT, Answer, free_answers
from scldm.metrics.perturbation.screen import Combination, Screen

ROOT = Path(__file__).resolve().parents[1]
SCREENS = ("gbm", "airway", "papalexi", "worm", "synthetic")
MATCHED = 600  # cells that factors are fitted on


def answers(screen: Screen, pair: Combination, rng: np.random.Generator) -> dict[str, Answer]:
    """Return cells with the combination's own mean shift, by way."""
    control = sp.csr_matrix(screen.cells(pair[0], screen.control))
    counts = control.toarray().astype(np.float64)
    shift = screen.mean(*pair) - screen.mean(pair[0], screen.control)
    expected = counts.sum(1, keepdims=True) * (counts.sum(0) / counts.sum())
    theta = LabelBaseline.fit(control, np.full(len(counts), "control")).table["control"].theta
    found = {"log shift": Answer(np.maximum(log1p_cp10k(control).toarray() + shift, 0))}
    for name, inverse in (("Poisson gain", np.full_like(theta, np.inf)), ("NB gain", np.clip(theta, 1e-3, 1e6))):
        change = Change(counts, expected, expected, inverse[None])
        factors = matched_factors(change[:MATCHED], shift, rng)
        found[name] = Answer.of(sp.csr_matrix(draw_changed(change.times(factors), rng)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", choices=list(perturbation_screens.STUDIES), action="append")
    parser.add_argument("--most", type=int, default=8, help="combinations of a screen, drawn by seed 0")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.only or SCREENS:
        study, rng = perturbation_screens.read(args.data, name), np.random.default_rng(0)
        asked = study.combinations
        scores: dict[str, list[float]] = {}
        for pair in [asked[i] for i in rng.permutation(len(asked))[: args.most]]:
            known = study.screen.without([pair])
            space = RealSpace.fit(known.counts, n_top_genes=2_000, n_pcs=30, seed=0)
            judge = CombinationJudge(known, {pair: study.screen.cells(*pair)}, space, seed=0)
            free = free_answers(known, *pair, np.random.default_rng(0))
            found = judge.score(pair, answers(study.screen, pair, rng) | {SHIFT: free[SHIFT]}).scores
            for way, values in found.items():
                scores.setdefault(way, []).append(values["energy"])
        for way, values in scores.items():
            plain = float(np.mean(scores[SHIFT]))
            value = float(np.mean(values))
            spread = (min(values), max(values))
            rows.append(Row(f"limit.{name}.{way.replace(' ', '_')}", value, "energy distance", plain,
                            plain / value if value > 0 else None, len(values), spread))  # fmt: skip
    report(rows, args.json)


if __name__ == "__main__":
    main()
