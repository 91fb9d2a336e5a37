"""Screens with a context and a treatment, for `perturbation.py`, and which combinations are held out together.

    gbm        five patients × panobinostat
    airway     three cell types × CFTR knock-out
    jurkat     21 knocked-out genes × stimulation of the T cell receptor
    worm       neurons of nine types × time, the control is 400 minutes
    papalexi   three replicates × the knock-outs whose effect two halves of the cells agree on
    synthetic  eight contexts × four treatments of known effect

Shape letters: n cells, g genes, c contexts, t treatments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp

from scldm.metrics.perturbation.leave_out import askable, folds
from scldm.metrics.perturbation.screen import Combination, Screen

MIN_CELLS = 25  # of a combination that is asked for
PAPALEXI = ("IFNGR1", "IFNGR2", "JAK2", "STAT1", "SMAD4", "IRF1")
CONTEXTS, TREATMENTS, GENES, CELLS = 8, 4, 500, 150  # synthetic: cells of a combination
SHARED, OWN = 0.5, 0.25  # synthetic: standard deviation of log effects that all contexts share, and of their own


@dataclass(frozen=True)
class Study:
    """A screen with its genes and the combinations to ask for."""

    genes: tuple[str, ...]
    screen: Screen
    truth: dict[Combination, np.ndarray] | None = None  # share of each gene, of synthetic screens

    @property
    def combinations(self) -> list[Combination]:
        """Measured combinations that can be asked for: enough cells, a control, and another context with both."""
        return askable(self.screen, MIN_CELLS)

    def folds(self, most: int, rng: np.random.Generator) -> list[list[Combination]]:
        """Return combinations to hold out together, at most `most` groups: no treatment loses all its contexts."""
        return folds(self.combinations, most, rng)


def read(folder: Path, name: str) -> Study:
    return STUDIES[name](folder / "perturbation" if name not in ("worm",) else folder)


def gbm(folder: Path) -> Study:
    data = anndata.read_h5ad(folder / "gbm_panobinostat_lemur.h5ad")
    return _study(data, "patient_id", "condition", "ctrl")


def airway(folder: Path) -> Study:
    data = anndata.read_h5ad(folder / "pig_airway_cftr.h5ad")
    return _study(data, "cell_type", "genotype", "WT")


def jurkat(folder: Path) -> Study:
    data = anndata.read_h5ad(folder / "datlinger2021_jurkat_tcr_cropseq.h5ad")
    return _study(data, "target_gene", "stimulation", "unstimulated")


def worm(folder: Path) -> Study:
    data = anndata.read_h5ad(folder / "worm_embryo_neurons.h5ad")
    data = data[data.obs["time_point"] != "mixed"]
    variance = np.asarray(data.X.power(2).mean(0) - np.square(data.X.mean(0))).ravel()
    return _study(data[:, np.sort(np.argsort(-variance)[:2_000])], "cell_type", "time_point", "400_minutes")


def papalexi(folder: Path) -> Study:
    data = anndata.read_h5ad(folder / "papalexi_eccite_lowmoi.h5ad")
    return _study(
        data[data.obs["target_gene"].isin(["non-targeting", *PAPALEXI])], "bio_rep", "target_gene", "non-targeting"
    )


def synthetic(folder: Path) -> Study:
    """Contexts share a part of every effect and have a part of their own, which follows from their profile."""
    rng = np.random.default_rng(0)
    programs = rng.normal(size=(4, GENES))
    state = rng.normal(size=(CONTEXTS, 4))
    log = rng.normal(-1, 1.5, GENES) + 0.5 * state @ programs / 2
    shared = SHARED * rng.normal(size=(TREATMENTS, GENES)) * (rng.random((TREATMENTS, GENES)) < 0.2)
    depends = OWN * rng.normal(size=(TREATMENTS, 4, GENES)) * (rng.random((TREATMENTS, 1, GENES)) < 0.2) / 2
    counts, names, truth = [], [], {}
    for c in range(CONTEXTS):
        for t in range(TREATMENTS + 1):
            effect = 0.0 if t == 0 else 2 * (shared[t - 1] + state[c] @ depends[t - 1])
            share = np.exp(log[c] + effect)
            share /= share.sum()
            size = rng.lognormal(np.log(1_500), 0.3, CELLS)
            counts.append(sp.csr_matrix(rng.poisson(np.outer(size, share) * rng.gamma(4, 1 / 4, (CELLS, GENES)))))
            names += [(f"type {c}", f"treatment {t}" if t else "control")] * CELLS
            truth[names[-1]] = share
    context, treatment = (np.array(x) for x in zip(*names, strict=True))
    x = sp.vstack(counts, format="csr").astype(np.float32)
    return Study(tuple(f"gene{g}" for g in range(GENES)), Screen(x, context, treatment, "control"), truth)


STUDIES: dict[str, Callable[[Path], Study]] = {
    "gbm": gbm,
    "airway": airway,
    "jurkat": jurkat,
    "worm": worm,
    "papalexi": papalexi,
    "synthetic": synthetic,
}


def _study(data: anndata.AnnData, context: str, treatment: str, control: str) -> Study:
    counts = sp.csr_matrix(data.X, dtype=np.float32)
    kept = np.asarray(counts.sum(1)).ravel() >= 10
    context_of, treatment_of = (data.obs[c].astype(str).to_numpy().astype(str)[kept] for c in (context, treatment))
    return Study(tuple(map(str, data.var_names)), Screen(counts[kept], context_of, treatment_of, control))
