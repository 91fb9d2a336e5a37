"""Combinations that nobody measured: our cells beside every answer that is free.

Every combination of a screen (`perturbation_screens.py`) is held out once, models are trained on the rest, and each way
of `perturbation_lines.py` and each free answer (`scldm.metrics.perturbation.free_answers`) predicts its cells from the
context's control cells. Scores are those of `CombinationJudge`, energy and MMD in 30 components fitted on the cells
that are trained on. The floor is one half of the held-out cells against the other.

    python benchmarks/perturbation.py --json benchmarks/results/perturbation.json
    python benchmarks/perturbation.py --only gbm --seeds 1 --seconds 5 5 5       # does it run at all

What is there is not made again: results lie in --out, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import perturbation_lines
import perturbation_screens
import torch
from harness import Row, report

from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.perturbation.combinations import CombinationJudge
from scldm.metrics.perturbation.free_answers import COUNTS, FREE_ANSWERS, SHIFT, free_answers
from scldm.metrics.perturbation.measures import LOWER

ROOT = Path(__file__).resolve().parents[1]
OURS, MORE = "pooled", perturbation_lines.WAYS[-1]
EVEN, MOST_LOST = 0.5, 0.1  # shares of combinations: won by chance, and significantly worse at most
SHOWN = ("delta_pearson", "energy", "pr_auc", "mae", "lfc_cosine", "lfc_slope")


def run(name: str, args: argparse.Namespace) -> None:
    """All folds and seeds of a screen that are not there yet."""
    study = perturbation_screens.read(args.data, name)
    file = args.out / name / "results.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["seed"], r["context"], r["treatment"]) for r in read(file)}
    for seed in range(args.seeds):
        for fold in study.folds(args.folds, np.random.default_rng(seed)):
            if all((seed, *pair) in done for pair in fold):
                continue
            start, known = time.process_time(), study.screen.without(fold)
            trained = perturbation_lines.train(known, study.genes, seconds=args.seconds, seed=seed)
            space = RealSpace.fit(known.counts, n_top_genes=2_000, n_pcs=30, seed=0)
            weights = perturbation_lines.pool_weights(trained, known, seed)
            judge = CombinationJudge(known, {pair: study.screen.cells(*pair) for pair in fold}, space, seed=seed)
            for context, treatment in fold:
                free = free_answers(known, context, treatment, np.random.default_rng(seed))
                own = perturbation_lines.answers(trained, known, context, treatment, free, weights, seed)
                found = judge.score((context, treatment), own | free)
                line = {
                    "seed": seed, "context": context, "treatment": treatment, "n_measured": found.n_measured,
                    "weights": weights.round(3).tolist(),
                    "scores": found.scores,
                    "intervals": {k: {m: [i.low, i.high] for m, i in v.items()} for k, v in found.intervals.items()},
                }  # fmt: skip
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
            print(name, seed, len(fold), f"{time.process_time() - start:.0f} s", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(name: str, results: list[dict[str, Any]]) -> str:
    """Means over combinations and seeds."""
    lines = [f"| {name} | {' | '.join(SHOWN)} |", f"|---|{'---|' * len(SHOWN)}"]
    for who in ("floor", *perturbation_lines.WAYS, *FREE_ANSWERS, perturbation_lines.MORE_COUNTS):
        cells = []
        for metric in SHOWN:
            values = [r["scores"][who][metric] for r in results if metric in r["scores"].get(who, {})]
            cells.append(f"{np.mean(values):.3f}" if values else "–")
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rows(results: list[dict[str, Any]], suffix: str) -> list[Row]:
    """Return the rows of a screen: shares of combinations, and the energy distance of every way beside the shift's."""
    found = []
    for metric in ("energy", "delta_pearson", "mae", "pr_auc"):
        sign = -1 if metric in LOWER else 1
        for free in (SHIFT, COUNTS):
            name, wins, losses = free.replace(" ", "_"), [], []
            for r in results:
                # Generated cells are free: genes are compared with as many as it takes.
                ours, theirs = (r["scores"][who].get(metric) for who in (OURS if metric == "energy" else MORE, free))
                if ours is not None and theirs is not None:
                    wins.append(sign * (ours - theirs) > 0)
                if metric in r["intervals"][OURS]:
                    mine, other = (sorted(sign * x for x in r["intervals"][who][metric]) for who in (OURS, free))
                    losses.append(mine[1] < other[0])
            found.append(_share(f"{metric}.win_share_vs_{name}{suffix}", wins, EVEN))
            if losses:
                found.append(_share(f"{metric}.loss_share_vs_{name}{suffix}", losses, MOST_LOST))
    for way in [way for way in perturbation_lines.WAYS if way in results[0]["scores"] and way != MORE]:
        pairs = [(r["scores"][way]["energy"], r["scores"][SHIFT]["energy"]) for r in results]
        ours, free = (float(np.mean(side)) for side in zip(*pairs, strict=True))
        ratios = [b / a for a, b in pairs if a > 0]
        name = f"perturbation.{way.replace(' ', '_')}.vs_shift{suffix}"
        found.append(Row(name, ours, "energy distance", free, free / ours, len(pairs), (min(ratios), max(ratios))))
    return found


def _share(name: str, of: list[bool], baseline: float) -> Row:
    """A share of combinations beside what is asked of it; intervals by combinations are not given."""
    share = float(np.mean(of))
    return Row(name, share, "of combinations", baseline, share / baseline, len(of), (share, share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "perturbation")
    parser.add_argument("--only", choices=list(perturbation_screens.STUDIES), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, nargs=3, default=[30, 40, 0], metavar=("VAE", "FLOW", "TRANSPORT"),
        help="of the processor; 0 leaves transport out",
    )  # fmt: skip
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.only or list(perturbation_screens.STUDIES)
    found = {}
    for name in names:
        run(name, args)
        found[name] = read(args.out / name / "results.jsonl")
        print(table(name, found[name]))
    suffix = {name: f" {name}" for name in names}
    made = rows([r for name in names for r in found[name]], "")
    if len(names) > 1:
        made += [row for name in names for row in rows(found[name], suffix[name])]
    shown = {name: [{k: v for k, v in r.items() if k != "intervals"} for r in of] for name, of in found.items()}
    report(made, args.json, seconds=args.seconds, found=shown)


if __name__ == "__main__":
    main()
