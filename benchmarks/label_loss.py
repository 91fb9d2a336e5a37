"""Where the labels of generated cells get lost: in the VAE, in the flow, or for want of guidance. After `make quality`.

Scores of cells that were decoded from latents of training cells and of held-out cells (no flow in them), and of cells
that were generated with other guidance, each beside the generated cells and the floor. Reads stages, trains nothing.

    python benchmarks/label_loss.py runs/quality/worm
    python benchmarks/label_loss.py runs/quality/pbmc3k --space held_out --guidance 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

import scldm
from pipeline.config.job import EvaluateConfig
from pipeline.core.manifest import newest_manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.report.evaluation import evaluate
from pipeline.stages.evaluate import open_generated, read_generated

SHOWN = ("w2", "mmd2", "frechet", "auroc", "recall", "one_nn_accuracy", "label_accuracy.", "label_logistic_accuracy.")


def candidate(made: anndata.AnnData, obs: pd.DataFrame, name: str) -> anndata.AnnData:
    """Counts with labels, under names of their own."""
    out = anndata.AnnData(made.X.astype(np.float32), obs.astype(str).reset_index(drop=True), made.var[[]])
    out.obs_names = [f"{name} {i}" for i in range(out.n_obs)]
    return out


def alike(train: pd.DataFrame, wanted: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """A training cell with the labels of each wanted cell; any, where none has them."""
    have, want = (x.astype(str).agg("|".join, axis=1).to_numpy() for x in (train, wanted))
    rows = {key: np.flatnonzero(have == key) for key in np.unique(want)}
    return np.array([rng.choice(rows[key]) if len(rows[key]) else rng.integers(len(have)) for key in want])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("line", type=Path, help="a pipeline of make quality")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--space", choices=["training", "held_out"], default="training")
    args = parser.parse_args()
    model = scldm.load(args.line)
    labels = list(model.labels)
    ingested = IngestedDataset.open(newest_manifest(args.line, "ingest"))
    test, train = ingested.anndata("test"), ingested.anndata("train")
    cells = open_generated(newest_manifest(args.line, "generate"), test.var_names)
    generated = read_generated(cells, max_cells=5000, rng=np.random.default_rng(0))
    chosen = train[alike(train.obs[labels], test.obs[labels], np.random.default_rng(1))].copy()
    chosen.obs_names_make_unique()
    extra = {
        "decoded training": candidate(model.reconstruct(chosen, seed=3), test.obs[labels], "t"),
        "decoded held-out": candidate(model.reconstruct(test.copy(), seed=4), test.obs[labels], "h"),
    }
    asked = test.obs[labels].astype(str).value_counts().rename("n_cells").reset_index()
    for w in args.guidance:
        made = model.generate(asked.assign(guidance=w), seed=5)
        extra[f"guidance {w:g}"] = candidate(made, made.obs[labels], f"g{w:g}")
    config = EvaluateConfig(umap=False, resamples=5, refits=5, space_from=args.space)
    found = evaluate(held_out=test, training=train, generated=generated, labels=labels, config=config, extra=extra)
    columns = {"generated": found.generated, "floor": found.floor, **found.baselines}
    names = [k for k in found.generated if k.startswith(SHOWN)]
    table = {c: [s[k].value if k in s else np.nan for k in names] for c, s in columns.items()}
    print(pd.DataFrame(table, index=names).round(4).to_string())


if __name__ == "__main__":
    main()
