"""The comparison of count-aware pooling trains all inputs on the same cells from the same weights, and repeats."""

from __future__ import annotations

import count_aware
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from train_small import Parts, batches, build, split_cells, split_counts

from scldm.nn.config import VAEConfig

PLAN = count_aware.Plan(
    inputs=("count_aware", "log1p"), learning_rates=(1e-3, 3e-3), seeds=(0, 1), n_genes=30, steps=2, batch_size=8,
    d_model=8, n_layers=1, n_latent_tokens=2,
)  # fmt: skip


def made_up_cells(n: int = 60, n_genes: int = 40) -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    return sp.csr_matrix(rng.poisson(rng.gamma(1.0, 2.0, (n, n_genes))).astype(np.float32))


def made_up_parts() -> Parts:
    return split_counts(made_up_cells(), n_genes=PLAN.n_genes, seed=0)


def test_every_cell_is_in_one_part_and_an_epoch_holds_no_cell_twice():
    parts = split_cells(101, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(101))
    rows = batches(20, 8, seed=0)
    assert len(torch.cat([next(rows), next(rows)]).unique()) == 16  # the last four of the epoch are dropped


def test_genes_are_chosen_on_training_cells_only():
    counts = made_up_cells()
    _, _, held_out = split_cells(counts.shape[0], seed=0)
    other = counts.toarray()
    other[held_out] = np.roll(other[held_out], 7, axis=1)
    found = split_counts(sp.csr_matrix(other), n_genes=PLAN.n_genes, seed=0)
    np.testing.assert_array_equal(found.train.toarray(), made_up_parts().train.toarray())


def test_inputs_start_from_the_same_weights():
    counts = made_up_parts().train
    ours, theirs = (build(VAEConfig(input=kind), counts, seed=3).state_dict() for kind in ("count_aware", "projconcat"))
    shared = ours.keys() & theirs.keys()
    assert {name for name in ours.keys() ^ theirs.keys() if not name.startswith("encoder.counts.")} == set()
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)


def test_two_comparisons_give_the_same_numbers_and_keep_the_better_learning_rate():
    kept, lost = count_aware.compare("made up", made_up_parts(), PLAN)
    again, _ = count_aware.compare("made up", made_up_parts(), PLAN)
    assert [(r.nll, r.gene_pearson, r.lr) for r in kept] == [(r.nll, r.gene_pearson, r.lr) for r in again]
    assert [(r.input, r.seed) for r in kept] == [("count_aware", 0), ("count_aware", 1), ("log1p", 0), ("log1p", 1)]
    chosen = {r.input: r for r in kept if r.seed == 0}
    assert all(chosen[r.input].validation_nll <= r.validation_nll and chosen[r.input].lr != r.lr for r in lost)
    ours, theirs = count_aware.summarise(kept)
    assert ours.more_nll == (0.0, 0.0)
    assert theirs.more_nll[0] == pytest.approx(theirs.nll[0] - ours.nll[0])
