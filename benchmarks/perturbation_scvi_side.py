"""scVI's answer for held-out combinations: control cells decoded under another treatment.

Runs in scVI's environment (`make quality` makes it) and knows nothing of this repository. The treatment is the batch
covariate and the context a categorical one; a control cell is encoded, its posterior mean decoded under the treatment
that is asked for, and counts are drawn at the cell's library size. This is what `transform_batch` does, with counts.

    python benchmarks/perturbation_scvi_side.py FOLDER --control ctrl --seconds 60

FOLDER holds train.h5ad (obs: context, treatment) and asked.csv (the same columns); answer-K.h5ad and facts.json are
written for row K.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from scvi_side import draw

LABELS = ["treatment", "context"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--control", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scvi.settings.seed = args.seed
    adata = anndata.read_h5ad(args.folder / "train.h5ad")
    for label in LABELS:
        adata.obs[label] = adata.obs[label].astype(str).astype("category")
    scvi.model.SCVI.setup_anndata(adata, batch_key="treatment", categorical_covariate_keys=["context"])
    model = scvi.model.SCVI(adata, gene_likelihood="nb")
    start = time.time()
    model.train(
        accelerator="cpu", early_stopping=True, max_time={"seconds": args.seconds}, enable_progress_bar=False,
        logger=None,
    )  # fmt: skip
    seconds, rng = time.time() - start, np.random.default_rng(args.seed)
    asked = pd.read_csv(args.folder / "asked.csv", dtype=str)
    for k, row in enumerate(asked.to_dict("records")):
        mine = (adata.obs["context"] == row["context"]) & (adata.obs["treatment"] == args.control)
        rows = np.flatnonzero(mine.to_numpy())
        z = model.get_latent_representation(indices=rows)
        sizes = np.asarray(adata.X[rows].sum(1)).ravel()
        wanted = pd.DataFrame([{label: row[label] for label in LABELS}] * len(rows))
        anndata.AnnData(draw(model, z, sizes, wanted, rng)).write_h5ad(args.folder / f"answer-{k}.h5ad")
    epochs = len(model.history["elbo_train"])
    (args.folder / "facts.json").write_text(json.dumps({"seconds": seconds, "epochs": epochs}))


if __name__ == "__main__":
    main()
