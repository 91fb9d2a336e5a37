"""The fast forms of pooling, decoder, likelihood and sampling compute what the plain formulas compute."""

from __future__ import annotations

from typing import get_args

import plain_model as plain
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from scldm.data.batch import CellBatch
from scldm.nn.config import DiTConfig, InputMode, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.kernels.fused_pooling import Heads, PoolingEntries, pool_tables
from scldm.nn.kernels.nb_sparse import sparse_nb_nll
from scldm.nn.kernels.pooling import pool_cells
from scldm.nn.likelihood import nb_log_prob
from scldm.nn.vae import VAE

N_GENES = 50


def a_vae(dtype: torch.dtype = torch.float64, **choices) -> VAE:
    torch.manual_seed(0)
    settings = {"d_model": 16, "n_latent_tokens": 4, "latent_width": 6, "n_heads": 2, "n_heads_cross": 4}
    vae = VAE(VAEConfig(**{**settings, **choices}), n_genes=N_GENES).to(dtype)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


def some_cells(dtype: torch.dtype = torch.float64, n: int = 5) -> CellBatch:
    g = torch.Generator().manual_seed(1)
    counts = torch.poisson(torch.rand(n, N_GENES, generator=g) * 3, generator=g)
    return CellBatch.from_dense((counts * (torch.rand(n, N_GENES, generator=g) < 0.4)).to(dtype))


def gradients(vae: VAE, loss: Tensor) -> dict[str, Tensor]:
    vae.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1.0)  # a bias before a softmax has none but rounding
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_a_training_step_equals_upstreams_mathematics_written_plainly(dtype, tolerance):
    vae, cells = a_vae(dtype, input="log1p", gene_bias=False, genes_seq_len=40), some_cells(dtype)
    tokens = plain.padded_tokens(cells, 40)
    expected = plain.loss(vae, *tokens, cells.dense(N_GENES), cells.library_size)
    loss = vae(cells).mean()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    assert_equal(gradients(vae, loss), gradients(vae, expected), tolerance)


@pytest.mark.parametrize("mode", get_args(InputMode))
@pytest.mark.parametrize("genes_seq_len", [None, 40])
def test_pooling_by_tables_equals_autograd_through_every_entry(mode, genes_seq_len):
    vae, cells = a_vae(input=mode, genes_seq_len=genes_seq_len), some_cells()
    results = []
    for as_plain in (False, True):
        vae.encoder.plain = as_plain
        z = vae.encode(cells)
        results.append((z.detach(), gradients(vae, (z * torch.arange(6)).square().sum())))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-9)
    assert_equal(results[0][1], results[1][1], 1e-9)


@pytest.mark.parametrize("head", ["nb_shared", "nb_cell"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_hand_written_decoder_equals_the_plain_tiles(head, bias):
    vae = a_vae(head=head, bias=bias)
    z = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for fused in (True, False):
        z.grad = None
        out = vae.decoder(z, vae.gene_embedding, tile=13, fused=fused)
        found = gradients(vae, (out * torch.linspace(-1, 1, N_GENES)[:, None]).square().sum())
        results.append((out.detach(), {**found, "z": z.grad.clone()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-10)
    assert_equal(results[0][1], results[1][1], 1e-9)


def test_the_decoders_gradient_is_that_of_its_finite_differences():
    vae = a_vae(n_layers=0)
    z = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    embedding = vae.gene_embedding[:7].detach().clone().requires_grad_()
    assert gradcheck(lambda z, e: vae.decoder(z, e, tile=3, fused=True), (z, embedding))


def test_a_training_step_keeps_nothing_of_the_size_of_cells_by_genes_by_width():
    vae, cells = a_vae(torch.float32), some_cells(torch.float32)
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        vae(cells).mean().backward()
    assert N_GENES * 16 <= largest < 5 * N_GENES * 16 / 2  # the gene embedding; not b x g x d


@pytest.mark.parametrize("heads", [Heads(2, 3, 2), Heads(1, 3, 2), Heads(2, 2, 32)])
def test_poolings_gradient_is_that_of_its_finite_differences_and_its_value_the_plain_one(heads):
    g = torch.Generator().manual_seed(0)
    sizes, h, c = [3, 5, 1], heads.n_heads, heads.channels
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    table, scale, count_table = draw(6, heads.logits + h * c), draw(9), draw(4, heads.logits + h * c)
    genes = torch.cat([torch.randperm(6, generator=g)[:size] for size in sizes])
    kinds, log_number = torch.randint(0, 4, (9,), generator=g), draw(9)
    entries = PoolingEntries(genes, sizes, kinds, log_number)
    inputs = tuple(x.requires_grad_() for x in (table, scale, count_table))
    assert gradcheck(lambda t, s, k: pool_tables(t, entries, heads, scale=s, count_table=k), inputs)

    rows, of_count = table[genes] * scale[:, None], count_table[kinds]
    logits = rows[:, : heads.logits] + of_count[:, : heads.logits] + log_number[:, None]
    values = (rows[:, heads.logits :] * of_count[:, heads.logits :]).view(9, h, c)
    expected = pool_cells(logits.view(9, h, -1), values, sizes)
    torch.testing.assert_close(pool_tables(table, entries, heads, scale=scale, count_table=count_table), expected)


def test_a_cell_without_tokens_is_named():
    entries = PoolingEntries(torch.tensor([0, 1]), [1, 0, 1])
    with pytest.raises(ValueError, match=r"cells \[1\] of the batch have no tokens"):
        pool_tables(torch.randn(3, 2), entries, Heads(1, 1, 1))


@pytest.mark.parametrize("per_cell", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_likelihoods_gradient_is_that_of_its_finite_differences(per_cell, weighted):
    g = torch.Generator().manual_seed(0)
    b, s, n = 3, 7, 9
    log_proportion = torch.randn(b, s, dtype=torch.float64, generator=g).log_softmax(1).requires_grad_()
    theta = (torch.rand((b, s) if per_cell else (s,), dtype=torch.float64, generator=g) + 0.3).requires_grad_()
    weight = torch.rand(s, dtype=torch.float64, generator=g) + 1 if weighted else None
    place = torch.randperm(b * s, generator=g)[:n]
    counts = torch.randint(0, 6, (n,), generator=g).double()  # a zero among the entries counts as any zero does
    size = torch.tensor([20.0, 30.0, 5.0], dtype=torch.float64)

    def nll(log_proportion: Tensor, theta: Tensor) -> Tensor:
        return sparse_nb_nll(
            log_proportion, theta, library_size=size, weight=weight, cell=place // s, column=place % s, counts=counts
        )

    assert gradcheck(nll, (log_proportion, theta))
    dense = torch.zeros(b, s, dtype=torch.float64).index_put((place // s, place % s), counts)
    terms = nb_log_prob(dense, log_proportion.exp() * size[:, None], theta)
    expected = -(terms if weight is None else terms * weight).sum(1)
    torch.testing.assert_close(nll(log_proportion, theta), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("labels", [(), ("cell_type",), ("cell_type", "tissue")])
def test_sharing_the_time_among_cells_does_not_change_the_dits_prediction(labels):
    torch.manual_seed(0)
    config = DiTConfig(d_model=16, n_layers=2, n_heads=2)
    dit = DiT(config, n_latent_tokens=3, latent_width=4, n_classes={"cell_type": 3, "tissue": 2}).double()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.3)
    ids = {"cell_type": torch.tensor([0, 3, 1, 1, 0]), "tissue": torch.tensor([1, 0, 2, 2, 1])}
    conditions = {label: ids[label] for label in labels}
    x, t = torch.randn(5, 3, 4, dtype=torch.float64), torch.full((5,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(dit.at_one_time(conditions)(x, t), dit(x, t, conditions), rtol=0, atol=1e-12)
