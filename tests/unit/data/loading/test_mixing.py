"""How well an epoch is shuffled, on cells sorted by label: the guarantee of `order.py` as numbers.

Cells of a label fill whole storage tiles, the worst case (rho = 1). N = 128 tiles of 64 cells; a round draws L K = 32
of them (L = 4 lanes, K = 8 tiles a block); batches of G = 64 cells. `pytest -s` on this file
prints each number.
"""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from pipeline.data.loading.order import FeedOrder

TILE, N_TILES, N_LABELS = 64, 128, 8
LANES, TILES_PER_BLOCK, BATCH, EPOCHS = 4, 8, 64, 40
N = TILE * N_TILES


@pytest.fixture(scope="module")
def order():
    rows = TILE * TILES_PER_BLOCK
    return FeedOrder(np.arange(N), TILE, seed=11, batch_size=BATCH, lanes=LANES, block_rows=rows)


@pytest.fixture(scope="module")
def epochs(order):
    """Ids of the cells, (epoch, step, batch), in the order in which one worker sees them."""
    q, found = order.rows_per_lane, np.empty((EPOCHS, order.n_steps_per_epoch, BATCH), np.int64)
    for epoch in range(EPOCHS):
        for round_ in range(order.n_rounds):
            lanes = [order.block(epoch, round_, lane)[0].reshape(-1, q) for lane in range(LANES)]
            start = round_ * order.steps_per_round
            found[epoch, start : start + len(lanes[0])] = np.concatenate(lanes, axis=1)
    return found


@pytest.fixture(scope="module")
def random_epochs():
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(N) for _ in range(EPOCHS)]).reshape(EPOCHS, -1, BATCH)


def label_counts(ids):
    """(batches, labels)."""
    labels = ids.reshape(-1, BATCH) * N_LABELS // N
    return np.stack([(labels == k).sum(1) for k in range(N_LABELS)], axis=1)


def chi_square_per_degree(counts):
    """Mean over batches of sum (observed - expected)^2 / expected, over its mean in a random order."""
    expected = BATCH / N_LABELS
    hypergeometric = (N_LABELS - 1) * (N - BATCH) / (N - 1)
    return float(((counts - expected) ** 2 / expected).sum(1).mean() / hypergeometric)


def entropy(counts):
    """Of the labels of a batch, mean over batches, bits."""
    return float(stats.entropy(counts, base=2, axis=1).mean())


def exact_variance(p):
    """Of a label's share of a batch where every tile holds one label: tiles of a round, then cells of their block."""
    drawn, k, q, rows = LANES * TILES_PER_BLOCK, TILES_PER_BLOCK, BATCH // LANES, TILE * TILES_PER_BLOCK
    between = p * (1 - p) * (N_TILES - drawn) / (N_TILES - 1) / drawn
    within = p * (1 - p) * (1 - (N_TILES - k) / (N_TILES - 1) / k) * (rows - q) / (rows - 1) / BATCH
    return between + within


def test_the_variance_of_a_batchs_share_is_as_derived_and_within_the_guarantee(epochs):
    p = 1 / N_LABELS
    shares = label_counts(epochs) / BATCH
    found, bound = float(shares.var()), p * (1 - p) * (1 / BATCH + 1 / (LANES * TILES_PER_BLOCK))
    print(f"\nVar(batch share): {found:.5f}; derived {exact_variance(p):.5f}; guarantee {bound:.5f}")
    assert found == pytest.approx(exact_variance(p), rel=0.06)
    assert found <= bound


def test_chi_square_of_label_counts_is_within_the_design_effect(epochs, random_epochs):
    ours, random = (chi_square_per_degree(label_counts(x)) for x in (epochs, random_epochs))
    in_storage_order = chi_square_per_degree(label_counts(np.arange(N)))
    design_effect = 1 + BATCH / (LANES * TILES_PER_BLOCK)
    print(f"\nchi-square / expectation: {ours:.2f}; random {random:.2f}; unshuffled {in_storage_order:.1f}; "
          f"guarantee {design_effect:.2f}")  # fmt: skip
    assert random == pytest.approx(1, abs=0.05)
    assert ours <= design_effect
    assert in_storage_order > 10 * design_effect


def test_the_share_of_a_label_is_unbiased(epochs):
    """Over epochs, every label has the same share of the first batches; z beyond 4 would be a bias."""
    p = 1 / N_LABELS
    first = label_counts(epochs[:, 0]) / BATCH
    z = (first.mean(0) - p) / np.sqrt(exact_variance(p) / EPOCHS)
    print(f"\nz of the labels' shares of first batches: {np.round(z, 2)}")
    assert np.abs(z).max() < 4


def test_batches_hold_nearly_the_entropy_of_a_random_order(epochs, random_epochs):
    ours, random = entropy(label_counts(epochs)), entropy(label_counts(random_epochs))
    print(f"\nH(label) of a batch: {ours:.3f} bits; random {random:.3f}; all cells {np.log2(N_LABELS):.3f}")
    assert ours > 0.95 * random


def test_position_in_the_epoch_says_nothing_about_position_in_storage(epochs):
    """Spearman's rho. Tiles are what is drawn, so its sd is about 1 / sqrt(tiles - 1) and not that of 8,192 cells."""
    rho = np.array([stats.spearmanr(np.arange(N), epoch.ravel()).statistic for epoch in epochs])
    sd = 1 / np.sqrt(N_TILES - 1)
    print(
        f"\nSpearman: mean {rho.mean():.4f}, sd {rho.std():.4f} (expected 0 and {sd:.4f}), largest {abs(rho).max():.3f}"
    )
    assert abs(rho.mean()) < 4 * sd / np.sqrt(EPOCHS)
    assert np.abs(rho).max() < 4 * sd


def test_rows_of_a_block_have_no_runs(order):
    """Wald-Wolfowitz: above or below the block's median id, in the order seen; z must be standard normal."""
    z = []
    for epoch in range(EPOCHS):
        for round_ in range(order.n_rounds):
            for lane in range(LANES):
                ids, _ = order.block(epoch, round_, lane)
                z.append(runs_z(ids > np.median(ids)))
    z = np.array(z)
    unshuffled = runs_z(np.arange(N) > N / 2)
    print(f"\nruns test, {len(z)} blocks: mean z {z.mean():.3f}, sd {z.std():.3f}; unshuffled {unshuffled:.0f}")
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert stats.kstest(z, "norm").pvalue > 1e-3


def runs_z(above):
    n1, n2 = above.sum(), (~above).sum()
    runs, n = 1 + (np.diff(above.astype(int)) != 0).sum(), n1 + n2
    mean = 1 + 2 * n1 * n2 / n
    return float((runs - mean) / np.sqrt((mean - 1) * (mean - 2) / (n - 1)))


def test_consecutive_epochs_are_not_related(epochs):
    """Spearman between the places of a cell in two epochs; tiles decide, as above."""
    places = [np.argsort(epoch.ravel()) for epoch in epochs]
    rho = [stats.spearmanr(a, b).statistic for a, b in pairwise(places)]
    assert np.abs(rho).max() < 4 / np.sqrt(N_TILES - 1)
