"""The encoder's input in each mode is as documented, and drawn by cell, not by batch."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from scldm.data.batch import CellBatch
from scldm.data.gene_sampling import see_genes
from scldm.data.genes_seen import GenesSeenConfig
from scldm.nn.likelihood import nb_log_prob, nb_nll

G = 30


def some_cells(n: int = 8, seed: int = 0) -> CellBatch:
    g = torch.Generator().manual_seed(seed)
    expressed = torch.rand(n, G, generator=g) < torch.linspace(0.1, 0.9, n)[:, None]
    counts = (torch.poisson(torch.full((n, G), 3.0), generator=g) + 1) * expressed
    return dataclasses.replace(CellBatch.from_dense(counts), joinids=torch.arange(n) * 7 + 100)


def seen(cells: CellBatch, mode: str, n: int | None = None, *, seed: int = 0, **more) -> CellBatch:
    return see_genes(cells, GenesSeenConfig(mode=mode, n=n), n_genes=G, seed=seed, **more)


def entries(cells: CellBatch) -> list[dict[int, float]]:
    """Gene to count, by cell."""
    ends = cells.offsets.tolist()
    pairs = list(zip(cells.gene_ids.tolist(), cells.counts.tolist(), strict=True))
    return [dict(pairs[a:b]) for a, b in pairwise(ends)]


@pytest.mark.parametrize("mode", ["all", "none", "random", "weighted", "random_expressed", "expressed_zero"])
def test_entries_are_distinct_genes_with_the_counts_of_the_cell(mode):
    cells = some_cells()
    n = None if mode in ("all", "none") else 12
    out = seen(cells, mode, n, mean_counts=torch.ones(G))
    dense = cells.dense(G)
    for cell, found in enumerate(entries(out)):
        assert len(found) == int(out.lengths[cell])
        assert list(found) == sorted(found)
        assert all(dense[cell, gene] == count for gene, count in found.items())
    assert torch.equal(out.library_size, cells.library_size)
    assert torch.equal(out.joinids, cells.joinids)


def test_expressed_is_the_cell_as_it_is_and_all_adds_its_zeros():
    cells = some_cells()
    assert seen(cells, "expressed") is cells
    for mode in ("all", "none"):
        assert seen(cells, mode).lengths.tolist() == [G] * 8
        assert torch.equal(seen(cells, mode).dense(G), cells.dense(G))


def test_random_expressed_keeps_at_most_n_genes_all_with_a_count():
    cells = some_cells()
    out = seen(cells, "random_expressed", 5)
    assert out.lengths.tolist() == cells.lengths.clamp(max=5).tolist()
    assert bool((out.counts > 0).all())


def test_share_expressed_sees_that_share_of_the_genes_with_a_count_and_empties_no_cell():
    cells = CellBatch.from_dense(torch.arange(1.0, 201).repeat(50, 1))
    out = see_genes(cells, GenesSeenConfig(mode="share_expressed", share=0.7), n_genes=200, seed=0)
    assert out.lengths.double().mean().item() / 200 == pytest.approx(0.7, abs=0.02)
    assert out.lengths.unique().numel() > 5  # each gene on its own, not a fixed number
    assert torch.equal(out.counts, (out.gene_ids + 1).float())
    some = some_cells()
    few = see_genes(some, GenesSeenConfig(mode="share_expressed", share=1e-9), n_genes=G, seed=0)
    assert few.lengths.tolist() == some.lengths.clamp(max=1).tolist()
    empty = CellBatch.from_dense(torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]))
    config = GenesSeenConfig(mode="share_expressed", share=1e-9)
    assert see_genes(empty, config, n_genes=2, seed=0).lengths.tolist() == [0, 1, 0]


def test_what_a_share_sees_of_a_cell_depends_on_seed_and_cell_alone():
    cells, config = some_cells(), GenesSeenConfig(mode="share_expressed", share=0.5)
    alone = dataclasses.replace(CellBatch.from_dense(cells.dense(G)[3:4]), joinids=cells.joinids[3:4])
    together = entries(see_genes(cells, config, n_genes=G, seed=0))
    assert together[3] == entries(see_genes(alone, config, n_genes=G, seed=0))[0]
    assert together != entries(see_genes(cells, config, n_genes=G, seed=1))
    more = GenesSeenConfig(mode="share_expressed", share=0.8)
    for few, many in zip(together, entries(see_genes(cells, more, n_genes=G, seed=0)), strict=True):
        assert few.keys() <= many.keys()


def test_random_sees_n_genes_whether_expressed_or_not():
    out = seen(some_cells(), "random", 12)
    assert out.lengths.tolist() == [12] * 8
    assert bool((out.counts == 0).any())
    assert bool((out.counts > 0).any())


def test_expressed_zero_takes_expressed_genes_first():
    cells = some_cells()
    for cell, found in enumerate(entries(seen(cells, "expressed_zero", 12))):
        assert sum(count > 0 for count in found.values()) == min(12, int(cells.lengths[cell]))
        assert len(found) == 12


def shares(mode: str, n: int, counts: list[float], draws: int = 4000, **more) -> torch.Tensor:
    """How often each gene of a small cell is seen."""
    cells = CellBatch.from_dense(torch.tensor([counts]).expand(draws, -1))
    out = see_genes(cells, GenesSeenConfig(mode=mode, n=n), n_genes=len(counts), seed=3, **more)
    return torch.bincount(out.gene_ids, minlength=len(counts)) / draws


def test_draws_are_even_over_cells():
    assert (shares("random", 2, [0, 1, 5, 0, 2]) - 0.4).abs().max() < 0.03
    expressed = shares("random_expressed", 2, [0, 1, 5, 0, 2])
    assert (expressed - torch.tensor([0, 2 / 3, 2 / 3, 0, 2 / 3])).abs().max() < 0.03
    filled = shares("expressed_zero", 4, [0, 1, 5, 0, 2])
    assert (filled - torch.tensor([0.5, 1, 1, 0.5, 1])).abs().max() < 0.03


def test_weighted_draws_by_count_over_the_mean_of_the_gene():
    means = torch.tensor([1.0, 2.0, 1.0])
    drawn = shares("weighted", 1, [3, 3, 0], mean_counts=means)  # weights 4, 2, 1
    assert (drawn - torch.tensor([4, 2, 1]) / 7).abs().max() < 0.03
    two = shares("weighted", 2, [3, 3, 0], mean_counts=means)
    assert two[0].item() == pytest.approx(4 / 7 + 2 / 7 * 4 / 5 + 1 / 7 * 4 / 6, abs=0.03)


@pytest.mark.parametrize("mode", ["random", "weighted", "random_expressed", "expressed_zero"])
def test_a_cells_draw_depends_on_seed_and_cell_alone(mode):
    cells = some_cells()
    dense = cells.dense(G)
    alone = dataclasses.replace(CellBatch.from_dense(dense[3:4]), joinids=cells.joinids[3:4])
    more = {"mean_counts": torch.ones(G)}
    together = entries(seen(cells, mode, 6, **more))
    assert together[3] == entries(seen(alone, mode, 6, **more))[0]
    assert together == entries(seen(cells, mode, 6, **more))
    assert together != entries(seen(cells, mode, 6, seed=1, **more))


def test_cells_with_equal_counts_draw_differently():
    same = CellBatch.from_dense(torch.ones(5, G))
    assert len({tuple(found) for found in entries(seen(same, "random_expressed", 6))}) == 5


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="mode random needs n"):
        GenesSeenConfig(mode="random")
    with pytest.raises(ValueError, match=r"mode all takes no n \(5\)"):
        GenesSeenConfig(mode="all", n=5)
    with pytest.raises(ValueError, match=r"mode share_expressed needs a share"):
        GenesSeenConfig(mode="share_expressed")
    with pytest.raises(ValueError, match=r"mode expressed takes no share \(0\.5\)"):
        GenesSeenConfig(share=0.5)
    with pytest.raises(ValueError, match=r"n \(31\) genes cannot be drawn among 30"):
        seen(some_cells(), "random", 31)
    with pytest.raises(ValueError, match=r"needs mean_counts of shape \(30,\); got None"):
        seen(some_cells(), "weighted", 3)
    with pytest.raises(ValueError, match="must be > 0 for mode weighted; the smallest is 0"):
        seen(some_cells(), "weighted", 3, mean_counts=torch.zeros(G))


@pytest.mark.parametrize("theta", [torch.full((G,), 0.7), torch.rand(8, G, generator=torch.Generator().manual_seed(1))])
def test_zeros_among_the_entries_do_not_change_the_likelihood(theta):
    cells = some_cells()
    cells = dataclasses.replace(cells, counts=cells.counts.double(), library_size=cells.library_size.double())
    theta = theta.double() + 0.1
    log_proportion = torch.randn(8, G, generator=torch.Generator().manual_seed(2)).double().log_softmax(1)
    mu = log_proportion.exp() * cells.library_size[:, None]
    plain = -nb_log_prob(cells.dense(G), mu, theta.expand_as(mu)).sum(1)
    for batch in (cells, seen(cells, "all")):
        torch.testing.assert_close(nb_nll(batch, log_proportion, theta), plain, rtol=1e-12, atol=1e-12)
