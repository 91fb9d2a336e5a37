"""Scores pairs of files with cell-eval, for `perturbation_cell_eval.py`.

Runs in an environment of its own (cell-eval wants other versions than we do) and knows nothing of this repository. The
folder holds a folder for each pair, with real.h5ad and pred.h5ad; scores.json gets the mean over the treatments of
each pair, and what the processor spent.

    python benchmarks/perturbation_cell_eval_side.py FOLDER --control control
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import anndata
from cell_eval import MetricsEvaluator

SKIPPED = ["clustering_agreement", "pearson_edistance"]  # fail or mean nothing with one treatment
ALONE = ["discrimination_score_l1", "discrimination_score_l2", "discrimination_score_cosine"]  # want several treatments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--control", required=True)
    args = parser.parse_args()
    found = {}
    for pair in sorted(path for path in args.folder.iterdir() if path.is_dir()):
        real, pred = (anndata.read_h5ad(pair / f"{side}.h5ad") for side in ("real", "pred"))
        several = real.obs["perturbation"].nunique() > 2  # one is the control
        evaluator = MetricsEvaluator(
            pred, real, control_pert=args.control, pert_col="perturbation", num_threads=1, outdir=str(pair / "scores")
        )
        results, _ = evaluator.compute(skip_metrics=[*SKIPPED, *([] if several else ALONE)], write_csv=False)
        found[pair.name] = results.to_dicts()
    document = {"version": version("cell-eval"), "seconds": time.process_time(), "pairs": found}
    (args.folder / "scores.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
