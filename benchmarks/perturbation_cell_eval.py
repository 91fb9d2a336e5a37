"""Combinations that nobody measured, scored by cell-eval: our cells beside every answer that is free.

Trains and predicts as `perturbation.py` does, writes each answer as the pair of files of `scldm cells export --to
cell-eval`, one pair for each held-out context, and lets cell-eval score them in its own environment
(`perturbation_cell_eval_side.py`). A row is the mean over held-out combinations; the pooled answer is ours.

    python -m venv runs/cell-eval && runs/cell-eval/bin/pip install cell-eval==0.8.2
    python benchmarks/perturbation_cell_eval.py --python runs/cell-eval/bin/python \
        --json benchmarks/results/perturbation_cell_eval.json

A screen whose scores lie in --out is not made again: give another --out, or remove it, for other budgets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import perturbation_lines
import perturbation_screens
import torch
from anndata import AnnData
from harness import Row, report

from pipeline.inference.export.cell_eval import cell_eval_sides
from scldm.data.cell_counts import LOG1P_CP10K, SCALE
from scldm.metrics.perturbation.free_answers import COUNTS, NB, SHIFT, Answer, free_answers
from scldm.metrics.perturbation.screen import Combination, Screen

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "CELL_EVAL_PYTHON"
OURS = "pooled"
ANSWERS = (OURS, "carried in counts", "noise", SHIFT, COUNTS, NB)
METRICS = (
    "pr_auc", "pearson_delta", "mae", "overlap_at_50", "de_spearman_sig", "discrimination_score_l1"
)  # fmt: skip
SMALLER_IS_BETTER = ("mae",)
Scores = dict[str, dict[Combination, dict[str, float]]]  # answer -> combination -> metric -> value


def predict(study: perturbation_screens.Study, folder: Path, args: argparse.Namespace) -> None:
    """Train for each fold and write a pair of files for each answer and held-out context."""
    for fold in study.folds(args.folds, np.random.default_rng(args.seed)):
        start, known = time.process_time(), study.screen.without(fold)
        trained = perturbation_lines.train(known, study.genes, seconds=args.seconds, seed=args.seed)
        weights = perturbation_lines.pool_weights(trained, known, args.seed)
        found: dict[Combination, dict[str, Answer]] = {}
        for pair in fold:
            free = free_answers(known, *pair, np.random.default_rng(args.seed))
            found[pair] = free | perturbation_lines.answers(trained, known, *pair, free, weights, args.seed)
        for context in sorted({context for context, _ in fold}):
            for name in ANSWERS:
                own = {pair: answers[name] for pair, answers in found.items() if pair[0] == context}
                _write(folder / f"{name}@{context}", study, known, own)
        print(fold, f"{time.process_time() - start:.0f} s", flush=True)


def _write(folder: Path, study: perturbation_screens.Study, known: Screen, own: dict[Combination, Answer]) -> None:
    """Write the files of one context's held-out treatments."""
    screen, answers = study.screen, list(own.values())
    if all(answer.counts is not None for answer in answers):
        x, uns = np.concatenate([answer.counts.toarray() for answer in answers]), {}  # type: ignore[union-attr]
    else:
        x, uns = np.concatenate([answer.log for answer in answers]), {"scldm": {SCALE: LOG1P_CP10K}}
    asked = [pair for pair, answer in own.items() for _ in range(len(answer.log))]
    generated = _cells(x.astype(np.float32), *map(np.array, zip(*asked, strict=True)), study.genes)  # type: ignore[arg-type]
    generated.uns = uns
    rows = np.concatenate([screen.members[pair] for pair in own])
    measured = _cells(screen.counts[rows], screen.context[rows], screen.treatment[rows], study.genes)
    training = _cells(known.counts, known.context, known.treatment, study.genes)
    sides = cell_eval_sides(
        generated, measured, training, control={"treatment": screen.control}, context=["context"]
    )  # fmt: skip
    folder.mkdir(parents=True)
    for name, adata in sides.items():
        adata.write_h5ad(folder / f"{name}.h5ad")


def _cells(x: Any, context: np.ndarray, treatment: np.ndarray, genes: tuple[str, ...]) -> AnnData:
    obs = pd.DataFrame({"context": context, "treatment": treatment}, index=[str(i) for i in range(len(context))])
    return AnnData(x, obs, pd.DataFrame(index=list(genes)))


def scores(file: Path) -> Scores:
    """Read what cell-eval said; values that are not finite are left out."""
    found: Scores = {name: {} for name in ANSWERS}
    for key, results in json.loads(file.read_text())["pairs"].items():
        name, _, context = key.partition("@")
        for result in results:
            values = {m: float(v) for m, v in result.items() if m != "perturbation" and v is not None}
            kept = {m: round(v, 6) for m, v in values.items() if math.isfinite(v)}
            found[name][context, result["perturbation"]] = kept
    return found


def rows(found: dict[str, Scores]) -> list[Row]:
    """Return a row for each screen, metric and answer beside ours: means over combinations."""
    made = []
    for screen, of in found.items():
        for metric in METRICS:
            for name in ANSWERS[1:]:
                pairs = [
                    (of[OURS][pair][metric], other[metric])
                    for pair, other in of[name].items()
                    if metric in other and metric in of[OURS][pair]
                ]
                if not pairs:
                    continue
                ours, theirs = (float(np.mean(side)) for side in zip(*pairs, strict=True))
                sign = -1 if metric in SMALLER_IS_BETTER else 1
                both = [(a, b) if sign > 0 else (b, a) for a, b in pairs]
                ratio, spread = None, None
                if min(min(pair) for pair in both) > 0:  # a correlation or an overlap that is 0 or below has no ratio
                    ratio = ours / theirs if sign > 0 else theirs / ours
                    spread = (min(a / b for a, b in both), max(a / b for a, b in both))
                label = f"{screen}.{metric}.pooled_vs_{name.replace(' ', '_')}"
                made.append(Row(label, ours, metric, theirs, ratio, len(pairs), spread))
    return made


def table(screen: str, of: Scores) -> str:
    """Means over combinations, Markdown."""
    lines = [f"| {screen} | {' | '.join(METRICS)} |", f"|---|{'---|' * len(METRICS)}"]
    for name in ANSWERS:
        values = [[v[m] for v in of[name].values() if m in v] for m in METRICS]
        lines.append(f"| {name} | {' | '.join(f'{np.mean(v):.3f}' if v else '–' for v in values)} |")
    return "\n".join(lines)


def evaluator(given: Path | None) -> Path:
    """Return the python that has cell-eval, or say how to make one."""
    python = given or (Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None)
    if python is None or not python.is_file():
        raise SystemExit(
            f"{python or 'no python'} cannot run cell-eval, which needs an environment of its own: python -m venv "
            "runs/cell-eval && runs/cell-eval/bin/pip install cell-eval==0.8.2; give --python "
            f"runs/cell-eval/bin/python, or set {VARIABLE} to it"
        )
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "perturbation_cell_eval")
    parser.add_argument("--python", type=Path, help=f"with cell-eval; default: the variable {VARIABLE}")
    parser.add_argument("--only", choices=list(perturbation_screens.STUDIES), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, nargs=3, default=[30, 40, 0], metavar=("VAE", "FLOW", "TRANSPORT"),
        help="of the processor; 0 leaves transport out, which is not scored here",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="5 s for each network and two folds: does it run at all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.folds = [5, 5, 0], 2
    python = evaluator(args.python)
    torch.set_num_threads(1)
    found, about = {}, {}
    for name in args.only or ["gbm", "airway"]:
        study, folder = perturbation_screens.read(args.data, name), args.out / name
        if not (folder / "scores.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            predict(study, folder, args)
            side = Path(__file__).with_name("perturbation_cell_eval_side.py")
            subprocess.run([python, side, folder, "--control", study.screen.control], check=True)
        said = json.loads((folder / "scores.json").read_text())
        about[name] = {
            "cell_eval": said["version"], "cell_eval_seconds": round(said["seconds"], 1),
        }  # fmt: skip
        found[name] = scores(folder / "scores.json")
        print(table(name, found[name]), flush=True)
    # The folder of the environment is no fact of the benchmark.
    sys.argv = [f"${VARIABLE}" if arg == str(args.python) else arg for arg in sys.argv]
    plain = {
        screen: {name: {f"{c} + {t}": v for (c, t), v in pairs.items()} for name, pairs in of.items()}
        for screen, of in found.items()
    }
    report(rows(found), args.json, seconds=args.seconds, folds=args.folds, seed=args.seed, ran=about, found=plain)


if __name__ == "__main__":
    main()
