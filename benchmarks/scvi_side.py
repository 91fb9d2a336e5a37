"""scVI as a generator: trained on the same cells within a budget of seconds, asked for cells of given labels.

Runs in an environment of its own (`make quality` makes it: scvi-tools wants other versions than we do) and knows
nothing of this repository. The first label is scVI's batch covariate, the others are its categorical covariates, which
makes p(x | z, labels) the decoder and leaves z ~ N(0, I) the same prior for all labels. Three ways to draw:

* prior: z from N(0, I), as the generative model says;
* per label: z from a Gaussian of the latents of the labels' training cells, its covariance shrunk to the one within
  classes: what a user who wants cells of a class would fit;
* posterior: z from q(z | x) of a training cell of the labels, drawn with replacement, with that cell's library size:
  training cells with new noise, and no model of which cells there are.

Library sizes of the first two are those of training cells of the labels, drawn with replacement. Labels that no
training cell has together stand for the first of them. Cells of split `validation` decide when training stops.

    python benchmarks/scvi_side.py TRAIN.h5ad ASKED.csv OUT --label cell_type donor --seconds 600
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch

BATCH = 256  # cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("asked", type=Path, help="CSV with the label columns, a row for each cell that is wanted")
    parser.add_argument("out", type=Path, help="folder for prior.h5ad, posterior.h5ad and facts.json")
    parser.add_argument("--label", required=True, nargs="+")
    parser.add_argument("--seconds", type=float, required=True, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scvi.settings.seed = args.seed
    adata = anndata.read_h5ad(args.train)
    for label in args.label:
        adata.obs[label] = adata.obs[label].astype(str).astype("category")
    first, others = args.label[0], args.label[1:]
    scvi.model.SCVI.setup_anndata(adata, batch_key=first, categorical_covariate_keys=others or None)
    model = scvi.model.SCVI(adata, gene_likelihood="nb")
    start = time.time()
    learned = np.flatnonzero((adata.obs["split"] == "train").to_numpy())
    watched = np.flatnonzero((adata.obs["split"] == "validation").to_numpy())
    # Its own rule for epochs (400 below 20,000 cells) and its own early stopping; the budget ends it before that.
    model.train(
        accelerator="cpu", early_stopping=True, max_time={"seconds": args.seconds}, enable_progress_bar=False,
        logger=None, datasplitter_kwargs={"external_indexing": [learned, watched, np.array([], dtype=int)]},
    )  # fmt: skip
    seconds = time.time() - start
    asked = pd.read_csv(args.asked, dtype=str)[args.label]
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    obs = adata.obs.iloc[learned]
    members = [members_of(obs, row) for row in asked.to_dict("records")]
    mean, variance = model.get_latent_representation(indices=learned, return_dist=True)
    counts = np.asarray(adata.X[learned].sum(1)).ravel()
    source = np.array([rng.choice(rows) for rows in members])  # a training cell of the labels, for each
    latents = mean + np.sqrt(variance) * rng.standard_normal(mean.shape)  # a draw of every training cell
    posterior = mean[source] + np.sqrt(variance[source]) * rng.standard_normal(mean[source].shape)
    library = counts[[rng.choice(rows) for rows in members]]
    ways = {
        "prior": (rng.standard_normal(posterior.shape), library),
        "per label": (gaussian_draws(latents, members, obs[first].to_numpy(), rng), library),
        "posterior": (posterior, counts[source]),
    }
    for name, (z, sizes) in ways.items():
        made = anndata.AnnData(draw(model, z, sizes, asked, rng), var=adata.var)
        for label in args.label:
            made.obs[label] = pd.Categorical(asked[label], categories=adata.obs[label].cat.categories)
        made.write_h5ad(args.out / f"{name}.h5ad")
    facts = {"scvi_tools": scvi.__version__, "seconds": seconds, "epochs": len(model.history["elbo_train"])}
    (args.out / "facts.json").write_text(json.dumps(facts))


def members_of(obs: pd.DataFrame, wanted: dict[str, str]) -> np.ndarray:
    """Training cells with these labels; with the first of them, where none has all."""
    hits = [obs[label].to_numpy() == value for label, value in wanted.items()]
    rows = np.flatnonzero(np.logical_and.reduce(hits))
    return rows if len(rows) else np.flatnonzero(hits[0])


def gaussian_draws(
    latents: np.ndarray, members: list[np.ndarray], classes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A latent for each cell that is wanted: of a Gaussian fitted to the latents (n, e) of its members."""
    e = latents.shape[1]
    centred = np.concatenate([latents[classes == c] - latents[classes == c].mean(0) for c in np.unique(classes)])
    within = centred.T @ centred / len(centred)
    out = np.empty((len(members), e))
    for i, rows in enumerate(members):
        own = np.cov(latents[rows].T) if len(rows) > 1 else within
        weight = len(rows) / (len(rows) + e)
        out[i] = rng.multivariate_normal(latents[rows].mean(0), weight * own + (1 - weight) * within)
    return out


@torch.inference_mode()
def draw(
    model: scvi.model.SCVI, z: np.ndarray, library: np.ndarray, asked: pd.DataFrame, rng: np.random.Generator
) -> sp.csr_matrix:
    """Counts of cells with these latents, library sizes and labels."""
    classes = [model.adata_manager.get_state_registry("batch").categorical_mapping.tolist()]
    if asked.shape[1] > 1:
        found = model.adata_manager.get_state_registry("extra_categorical_covs").mappings
        classes += [list(found[label]) for label in asked.columns[1:]]
    codes = torch.tensor([[c.index(v) for c, v in zip(classes, row, strict=True)] for row in asked.to_numpy()])
    rows = []
    for start in range(0, len(z), BATCH):
        part = slice(start, start + BATCH)
        out = model.module.generative(
            z=torch.tensor(z[part], dtype=torch.float32),
            library=torch.tensor(np.log(library[part]), dtype=torch.float32)[:, None],
            batch_index=codes[part, :1],
            cat_covs=codes[part, 1:] if len(classes) > 1 else None,
        )["px"]
        mu, theta = out.mu.double().numpy(), out.theta.double().numpy()
        rate = rng.gamma(np.broadcast_to(theta, mu.shape)) * mu / theta
        rows.append(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
    return sp.vstack(rows, format="csr")


if __name__ == "__main__":
    main()
