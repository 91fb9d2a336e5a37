"""Combinations that nobody measured: our pooled cells beside scVI's, at equal seconds of training.

scVI decodes control cells under the treatment (`perturbation_scvi_side.py`), in an environment of its own. Both sides
train on the same cells with one thread, in turns. scGen and CPA were meant to stand here: scgen 2.1 imports a module
that scvi-tools no longer has.

    python benchmarks/perturbation_peers.py --json benchmarks/results/perturbation_peers.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import perturbation_lines
import perturbation_screens
import scipy.sparse as sp
import torch
from harness import Row, report

from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.perturbation.combinations import CombinationJudge
from scldm.metrics.perturbation.free_answers import Answer, free_answers
from scldm.metrics.perturbation.measures import LOWER
from scldm.metrics.perturbation.screen import Combination, Screen

ROOT = Path(__file__).resolve().parents[1]
SIDE = Path(__file__).with_name("perturbation_scvi_side.py")
SHOWN = ("energy", "delta_pearson", "mae", "pr_auc")
OURS, PEER = "pooled", "scvi"


def scvi_answers(known: Screen, fold: list[Combination], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train scVI and return its cells for each combination, with the seconds that it took."""
    folder.mkdir(parents=True, exist_ok=True)
    obs = pd.DataFrame({"context": known.context, "treatment": known.treatment}).astype(str)
    obs.index = obs.index.astype(str)
    anndata.AnnData(sp.csr_matrix(known.counts, dtype=np.float32), obs=obs).write_h5ad(folder / "train.h5ad")
    pd.DataFrame(fold, columns=["context", "treatment"]).to_csv(folder / "asked.csv", index=False)
    start = time.time()
    subprocess.run(
        [args.python, str(SIDE), str(folder), "--control", known.control, "--seconds", str(sum(args.seconds))],
        check=True, capture_output=True,
    )  # fmt: skip
    cells = {pair: anndata.read_h5ad(folder / f"answer-{k}.h5ad").X for k, pair in enumerate(fold)}
    return {"cells": cells, "wall": time.time() - start, **json.loads((folder / "facts.json").read_text())}


def run(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Score both sides on every combination of a screen."""
    study, found = perturbation_screens.read(args.data, name), []
    for k, fold in enumerate(study.folds(args.folds, np.random.default_rng(args.seed))):
        known = study.screen.without(fold)
        peer = scvi_answers(known, fold, args.out / name / str(k), args)
        start = time.time()
        trained = perturbation_lines.train(known, study.genes, seconds=[*args.seconds, 0], seed=args.seed)
        weights = perturbation_lines.pool_weights(trained, known, args.seed)
        wall = time.time() - start
        space = RealSpace.fit(known.counts, n_top_genes=2_000, n_pcs=30, seed=0)
        judge = CombinationJudge(known, {pair: study.screen.cells(*pair) for pair in fold}, space, seed=args.seed)
        for context, treatment in fold:
            free = free_answers(known, context, treatment, np.random.default_rng(args.seed))
            own = perturbation_lines.answers(trained, known, context, treatment, free, weights, args.seed)
            sides = {OURS: own[OURS], PEER: Answer.of(sp.csr_matrix(peer["cells"][context, treatment]))}
            scores = judge.score((context, treatment), sides | free).scores
            found.append({
                "screen": name, "context": context, "treatment": treatment, "wall": {OURS: wall, PEER: peer["wall"]},
                "epochs": peer["epochs"], "scores": scores,
            })  # fmt: skip
            print(name, context, treatment, {m: [round(scores[s].get(m, np.nan), 3) for s in sides] for m in SHOWN})
    return found


def rows(found: list[dict[str, Any]]) -> list[Row]:
    made = []
    for metric in SHOWN:
        pairs = [tuple(r["scores"][side].get(metric, np.nan) for side in (OURS, PEER)) for r in found]
        pairs = [(a, b) for a, b in pairs if np.isfinite(a) and np.isfinite(b)]
        ours, peer = (float(np.mean(side)) for side in zip(*pairs, strict=True))
        wins = float(np.mean([(a < b) == (metric in LOWER) for a, b in pairs]))
        ratio = peer / ours if metric in LOWER else ours / peer
        made.append(Row(f"perturbation.pooled.{metric}_vs_scvi", ours, metric, peer, ratio, len(pairs), None))
        made.append(Row(f"{metric}.win_share_vs_scvi", wins, "of combinations", 0.5, wins / 0.5, len(pairs), None))
    wall = [[r["wall"][side] for r in found] for side in (OURS, PEER)]
    ours, peer = (float(np.median(x)) for x in wall)
    made.append(Row("perturbation.wall_vs_scvi", ours, "seconds", peer, peer / ours, len(found), None))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "perturbation_peers")
    parser.add_argument("--python", default=str(ROOT / ".venv-scvi" / "bin" / "python"), help="with scvi-tools")
    parser.add_argument("--only", choices=list(perturbation_screens.STUDIES), action="append")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, nargs=2, default=[30, 40], metavar=("VAE", "FLOW"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [r for name in args.only or ["gbm", "airway"] for r in run(name, args)]
    report(rows(found), args.json, seconds=args.seconds, found=found)


if __name__ == "__main__":
    main()
