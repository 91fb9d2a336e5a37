"""What was not measured is not zero: it is left out of the likelihood and of what the encoder is shown."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.data.presence import Presence, read_measured
from scldm.data.batch import CellBatch
from scldm.data.gene_sampling import see_genes
from scldm.data.genes_seen import GenesSeenConfig
from scldm.nn.config import VAEConfig
from scldm.nn.likelihood import gene_probabilities, nb_log_prob, sample_genes
from scldm.nn.vae import VAE
from scldm.random import generator

B, G = 7, 23
HEADS = ["nb_shared", "nb_cell", "gaussian"]


@pytest.fixture
def measured():
    keep = torch.rand(B, G, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[0] = True  # a cell that measured everything
    keep[:, 0] = True
    keep[:, -1] = False  # a gene that nobody measured
    keep[0, -1] = True
    return keep


@pytest.fixture
def cells(measured):
    counts = torch.poisson(torch.full((B, G), 1.5, dtype=torch.float64), generator=torch.Generator().manual_seed(2))
    counts[:, 0] += 1
    return replace(CellBatch.from_dense(counts * measured), measured=measured)


def model(head="nb_shared", **more):
    torch.manual_seed(0)
    config = VAEConfig(
        d_model=8, n_layers=1, n_heads=2, n_heads_cross=2, n_latent_tokens=3, latent_width=4, head=head,
        gene_bias=head != "gaussian", **more,
    )  # fmt: skip
    vae = VAE(config, n_genes=G).double()
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return vae


def plain_nll(vae, cells, z):
    """Cell by cell, with a softmax over what was measured alone."""
    x, total = cells.dense(G), []
    for i in range(cells.n_cells):
        known = cells.measured[i].nonzero().squeeze(1)
        out = vae.decode(z[i : i + 1], cells.library_size[i : i + 1], genes=known)
        y = x[i, known]
        if vae.config.head == "gaussian":
            expression = (y / cells.library_size[i] * 10_000).log1p()
            total.append((expression - out.mu[0]).square().sum())
        else:
            theta = out.theta if out.theta.ndim == 1 else out.theta[0]
            total.append(-nb_log_prob(y, out.mu[0], theta).sum())
    return torch.stack(total)


@pytest.mark.parametrize("head", HEADS)
def test_the_likelihood_is_that_of_the_measured_genes_alone(cells, head):
    vae = model(head)
    z = vae.encode(cells)
    torch.testing.assert_close(vae.nll(cells, z), plain_nll(vae, cells, z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_measured_genes_alone(cells, head):
    vae = model(head)
    grads = []
    for nll in (vae.nll, lambda c, z: plain_nll(vae, c, z)):
        vae.zero_grad()
        nll(cells, vae.encode(cells)).sum().backward()
        grads.append({k: p.grad.clone() for k, p in vae.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad.isfinite().all(), name
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-7, atol=1e-9, msg=name)


def test_a_gene_that_nobody_measured_gets_no_gradient(cells):
    cells = replace(cells, measured=cells.measured & (torch.arange(G) < G - 1))
    vae = model()
    vae.nll(cells, vae.encode(cells)).sum().backward()
    assert vae.log_theta.grad[-1] == 0
    assert vae.gene_bias.grad[-1] == 0


@pytest.mark.parametrize("head", HEADS)
def test_a_mask_that_lets_everything_through_changes_nothing(cells, head):
    vae = model(head)
    z = vae.encode(cells)
    everything = replace(cells, measured=torch.ones(B, G, dtype=torch.bool))
    assert torch.equal(vae.nll(everything, z), vae.nll(replace(cells, measured=None), z))


def test_a_count_where_nothing_was_measured_does_not_count(cells, measured):
    """A store that contradicts itself must not cost a model its training: one such count would be hundreds of nats."""
    counts = cells.dense(G)
    counts[1, -1] = 4
    contradiction = replace(CellBatch.from_dense(counts), measured=measured, library_size=cells.library_size)
    vae = model()
    z = vae.encode(cells)
    torch.testing.assert_close(vae.nll(contradiction, z), vae.nll(cells, z))


def test_sampled_genes_estimate_the_masked_likelihood(cells):
    vae = model()
    z = vae.encode(cells).detach()
    full = vae.nll(cells, z)
    probability = gene_probabilities(torch.ones(G, dtype=torch.float64), G)
    everything = sample_genes(probability, generator(0, 1))
    torch.testing.assert_close(vae.nll(cells, z, sample=everything), full, rtol=1e-9, atol=1e-9)
    half = gene_probabilities(torch.ones(G, dtype=torch.float64), G // 2)
    for seed in range(5):
        nll = vae.nll(cells, vae.encode(cells), sample=sample_genes(half, generator(seed, 1)))
        nll.sum().backward()
        assert nll.isfinite().all()
        assert all(p.grad.isfinite().all() for p in vae.parameters() if p.grad is not None)


def test_a_cell_of_which_no_drawn_gene_was_measured_adds_nothing(cells):
    drawn = sample_genes(torch.zeros(G, dtype=torch.float64).index_fill(0, torch.tensor([3, 5]), 1.0), generator(0, 1))
    known = cells.measured.clone()
    known[2, [3, 5]] = False
    known[3, [3, 5]] = True
    vae = model()
    nll = vae.nll(replace(cells, measured=known), vae.encode(cells), sample=drawn)
    nll.sum().backward()
    assert nll[2] == 0
    assert nll[3] != 0
    assert all(p.grad.isfinite().all() for p in vae.parameters() if p.grad is not None)


def test_decoded_means_are_over_the_measured_genes(cells, measured):
    vae = model()
    mu = vae.decode_mu(vae.encode(cells), cells.library_size, measured=measured)
    assert (mu[~measured] == 0).all()
    torch.testing.assert_close(mu.sum(1), cells.library_size)


# ---- what the encoder sees ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "n"),
    [("all", None), ("none", None), ("random", 9), ("random", G), ("weighted", 9), ("expressed_zero", 20)],
)
def test_the_encoder_never_sees_a_zero_that_nobody_measured(cells, measured, mode, n):
    mean = torch.ones(G, dtype=torch.float64)
    seen = see_genes(cells, GenesSeenConfig(mode=mode, n=n), n_genes=G, seed=3, mean_counts=mean)
    assert measured[seen.cell_index, seen.gene_ids].all()
    torch.testing.assert_close(seen.counts, cells.dense(G)[seen.cell_index, seen.gene_ids])
    wanted = measured.sum(1) if n is None else measured.sum(1).clamp(max=n)
    assert seen.lengths.tolist() == wanted.tolist()
    assert seen.lengths.sum() == len(seen.gene_ids)


def test_draws_of_a_cell_that_measured_everything_do_not_change(cells):
    config = GenesSeenConfig(mode="random", n=9)
    with_mask = see_genes(cells, config, n_genes=G, seed=3)
    without = see_genes(replace(cells, measured=None), config, n_genes=G, seed=3)
    assert with_mask.gene_ids[:9].tolist() == without.gene_ids[:9].tolist()


# ---- groups ------------------------------------------------------------------------------------------------------
def test_groups_that_measured_the_same_become_one():
    found = Presence.from_files(
        ["a", "b", "c"], [np.array([0, 1]), np.array([0, 1, 2]), np.array([0, 1])], [2, 1, 3], 4
    )
    over = found.of_genes(np.array([1, 0, -1]))  # gene 2 of the source is not in the vocabulary
    assert over.names == ("a + b + c",)
    assert over.measured.tolist() == [[True, True, False]]
    over = found.of_genes(np.array([2, 0]))
    assert sorted(over.names) == ["a + c", "b"]
    for i, expected in enumerate([[0, 1], [0, 1], [1, 1], [0, 1], [0, 1], [0, 1]]):
        assert over.measured[over.group[i]].tolist() == [bool(x) for x in expected]
    assert over.cells_per_gene().tolist() == [1, 6]
    assert over.cells_per_gene(np.array([True, True, False, False, False, False])).tolist() == [0, 2]


def test_bits_survive_the_file(tmp_path):
    measured = np.random.default_rng(0).random((5, 1003)) < 0.5
    Presence(tuple("abcde"), measured, np.zeros(1, np.int32)).save(tmp_path / "p.parquet")
    np.testing.assert_array_equal(read_measured(tmp_path / "p.parquet"), measured)
    assert pd.read_parquet(tmp_path / "p.parquet")["n_measured"].tolist() == measured.sum(1).tolist()
