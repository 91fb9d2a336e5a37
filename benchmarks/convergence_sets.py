"""Sets of real cells for `vae_convergence.py` and `flow_convergence.py`: training and held-out
cells, with a class each.

Settings are chosen on some of the sets and tested on the others.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from transfer_cells import Cells
from transfer_lines import vocabulary_of

from scldm.data.vocabulary import Vocabulary
from scldm.random import generator

SPLIT = 11  # stream of randomness
N_GENES, MOST_HELD_OUT, MIN_COUNTS = 2_000, 800, 50
CHOSEN_ON, TESTED_ON = ("pbmc3k", "gbm"), ("worm", "airway")
FILES = {
    "pbmc3k": ("pbmc3k_full.h5ad", ("cell_type",)),
    "worm": ("worm_embryo_neurons.h5ad", ("cell_type", "time_point")),
    "gbm": ("perturbation/gbm_panobinostat_lemur.h5ad", ("patient_id", "condition")),
    "airway": ("perturbation/pig_airway_cftr.h5ad", ("cell_type", "genotype")),
}


def read(folder: Path, name: str, seed: int) -> tuple[Cells, Cells, Vocabulary]:
    """Return training cells, held-out cells and their vocabulary; the seed splits them."""
    file, labels = FILES[name]
    data = anndata.read_h5ad(folder / file)
    counts = sp.csr_matrix(data.X, dtype=np.float32)
    kept = np.flatnonzero(np.asarray(counts.sum(1)).ravel() >= MIN_COUNTS)
    classes = data.obs[list(labels)].astype(str).agg(" + ".join, axis=1).to_numpy().astype(str)[kept]
    counts = counts[kept]
    variance = np.asarray(counts.power(2).mean(0) - np.square(counts.mean(0))).ravel()
    genes = np.sort(np.argsort(-variance, kind="stable")[:N_GENES])
    counts = counts[:, genes]
    order = torch.randperm(len(classes), generator=generator(seed, SPLIT)).numpy()
    n_held_out = min(MOST_HELD_OUT, len(order) // 4)
    held_out, train = (Cells(counts[rows], classes[rows]) for rows in (order[:n_held_out], order[n_held_out:]))
    return train, held_out, vocabulary_of(tuple(map(str, data.var_names[genes])), set(classes.tolist()))
