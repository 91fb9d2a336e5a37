"""Counts and noise by counter: the published generator, the exact distribution, no other dependence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import stats

from scldm.generation.counter_random import normals, philox
from scldm.generation.nb_draw import INVERT_TO, draw_counts

ZERO, ONES = np.uint64(0), np.uint64(0xFFFFFFFF)


def test_the_generator_gives_the_published_words():
    """Known answers of Random123 (kat_vectors, philox4x32-10)."""
    assert [int(w) for w in philox(*[ZERO] * 6)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox(*[ONES] * 6)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_noise_is_normal_and_belongs_to_its_cell():
    noise = normals(range(20_000), 6, seed=1, stream=11)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise.T) - np.eye(6)).max() < 0.03
    np.testing.assert_array_equal(normals([7, 3], 2, seed=1, stream=11), noise[[7, 3], :2])
    assert not np.array_equal(normals([7], 6, seed=2, stream=11), noise[[7]])
    assert not np.array_equal(normals([7], 6, seed=1, stream=12), noise[[7]])


CASES = [
    (1e-3, 0.5), (0.05, 0.1), (0.5, 2.0), (3.0, 0.05), (INVERT_TO, 10.0), (8.0, 1e4),  # along the distribution function
    (INVERT_TO * 1.01, 0.3), (40.0, 5.0), (500.0, 1e4), (30.0, 0.02), (20_000.0, 2.0),  # gamma and Poisson
]  # fmt: skip


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    n = 60_000
    mu, theta = (np.array(x, np.float32) for x in zip(*CASES, strict=True))
    return draw_counts(np.tile(mu, (n, 1)), theta, range(n), seed=4, stream=13).toarray()


@pytest.mark.parametrize("column", range(len(CASES)), ids=[f"mu={m:g} theta={t:g}" for m, t in CASES])
def test_counts_follow_the_negative_binomial(drawn, column):
    (mu, theta), x = CASES[column], drawn[:, column]
    law = stats.nbinom(theta, theta / (theta + mu))
    edges = np.unique(law.ppf(np.linspace(0.02, 0.98, 25)).astype(np.int64))
    expected = np.diff(np.concatenate([[0], law.cdf(edges), [1]])) * len(x)
    seen = np.histogram(x, np.concatenate([[-0.5], edges + 0.5, [np.inf]]))[0]
    assert stats.chisquare(seen, expected).pvalue > 1e-4
    assert x.mean() == pytest.approx(mu, abs=5 * law.std() / np.sqrt(len(x)))


def test_a_theta_of_each_cell_is_that_cell_s_own():
    n = 20_000
    theta = np.where(np.arange(n)[:, None] % 2, 0.1, 50.0).astype(np.float32)
    x = draw_counts(np.full((n, 1), 5, np.float32), theta, range(n), seed=0, stream=13).toarray()[:, 0]
    assert x[1::2].var() == pytest.approx(5 + 25 / 0.1, rel=0.1)
    assert x[::2].var() == pytest.approx(5 + 25 / 50.0, rel=0.1)


def test_a_count_does_not_depend_on_other_draws():
    rng = np.random.default_rng(0)
    mu, theta = rng.gamma(0.3, 5, (150, 40)).astype(np.float32), rng.gamma(1, 2, 40).astype(np.float32)
    ids = np.arange(1000, 1150)
    whole = draw_counts(mu, theta, ids, seed=9, stream=13).toarray()
    some, cells = np.array([0, 3, 17, 18, 39]), [140, 2, 77]
    part = draw_counts(mu[cells], theta, ids[cells], seed=9, stream=13, genes=some)
    np.testing.assert_array_equal(part.toarray(), whole[np.ix_(cells, some)])
    with ThreadPoolExecutor(3) as pool:
        threads = draw_counts(mu, theta, ids, seed=9, stream=13, pool=pool)
    np.testing.assert_array_equal(threads.toarray(), whole)
    assert threads.has_canonical_format
    assert threads.data.min() > 0


def test_a_mean_of_zero_is_a_zero_and_no_cells_are_no_rows():
    assert draw_counts(np.zeros((3, 5), np.float32), np.ones(5, np.float32), range(3), seed=0, stream=1).nnz == 0
    assert draw_counts(np.zeros((0, 5), np.float32), np.ones(5, np.float32), [], seed=0, stream=1).shape == (0, 5)
    with pytest.raises(ValueError, match="cell ids must be >= 0"):
        draw_counts(np.zeros((1, 5), np.float32), np.ones(5, np.float32), [-1], seed=0, stream=1)


def test_an_inverse_dispersion_that_underflows_draws_zeros():
    mu = np.array([[0.5, 8.0, 300.0]], np.float32)
    assert draw_counts(mu, np.zeros(3, np.float32), [0], seed=0, stream=5).nnz == 0
