"""What runs on an accelerator equals the plain formulas: pooling as one attention, and scoring without waiting."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from scldm.data.batch import CellBatch
from scldm.nn.config import InputMode, VAEConfig
from scldm.nn.kernels import pooling
from scldm.nn.likelihood import nb_nll, sample_genes, scored_entries, squared_error
from scldm.nn.vae import VAE

N_GENES, SIZES = 40, {"d_model": 16, "n_latent_tokens": 4, "latent_width": 6, "n_heads": 2, "n_heads_cross": 2}


def cells(seed: int = 0) -> CellBatch:
    g = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.rand(6, N_GENES, generator=g) * 3, generator=g)
    counts[torch.rand(6, N_GENES, generator=g) < torch.rand(6, 1, generator=g)] = 0  # cells of very different sizes
    counts[:, 0] = 1
    return CellBatch.from_dense(counts.double())


def encoder_gradients(mode: str, **form) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**SIZES, input=mode), n_genes=N_GENES).double()
    with torch.no_grad():
        for p in vae.encoder.counts.parameters():
            p.normal_(std=0.5)
    for name, value in form.items():
        setattr(vae.encoder, name, value)
    z = vae.encode(cells())
    (z * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)).sum().backward()
    return {"latents": z.detach()} | {k: p.grad for k, p in vae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", get_args(InputMode))
def test_pooling_as_one_attention_equals_pooling_entry_by_entry(mode):
    plain, packed = encoder_gradients(mode, plain=True), encoder_gradients(mode, packed=True)
    for name, value in plain.items():
        # What all entries of a softmax share has no gradient: rounding there, and none at all in the packed form.
        torch.testing.assert_close(packed.get(name, torch.zeros_like(value)), value, rtol=1e-9, atol=1e-9, msg=name)
    assert set(packed) <= set(plain)


def test_entries_are_not_compared_with_another_cells():
    many = cells()
    one = CellBatch.from_dense(many.dense(N_GENES)[3:4])
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**SIZES), n_genes=N_GENES).double()
    vae.encoder.packed = True
    torch.testing.assert_close(vae.encode(many)[3:4], vae.encode(one))


def test_flash_attention_gets_packed_entries_of_one_width(monkeypatch):
    """The kernel itself needs a GPU (tests/gpu); what it is given is checked here by a loop in its place."""
    asked = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale):
        asked.append((max_q, max_k))
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert query.shape[1:] == key.shape[1:] == value.shape[1:], "FlashAttention takes heads of one width"
        parts = []
        for i in range(len(cu_seq_k) - 1):
            q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
            parts.append(torch.einsum("qhk,khc->qhc", (torch.einsum("qhc,khc->qhk", q, k) * scale).softmax(-1), v))
        return torch.cat(parts)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    monkeypatch.setattr(pooling, "takes_packed", lambda k: True)
    packed = encoder_gradients("count_aware", packed=True)
    for name, value in encoder_gradients("count_aware", plain=True).items():
        torch.testing.assert_close(packed.get(name, torch.zeros_like(value)), value, rtol=1e-9, atol=1e-9, msg=name)
    assert asked == [(4, int(cells().lengths.max()))]


def test_the_largest_cell_is_known_before_a_batch_leaves_the_host():
    batch = cells()
    assert batch.longest is None
    assert batch.with_longest().longest == int(batch.lengths.max())
    moved = batch.to("meta")
    assert moved.longest == int(batch.lengths.max())
    assert batch.to("cpu").longest is None, "nothing waits for a CPU"


def test_a_cell_without_entries_is_refused_before_it_is_copied():
    empty = CellBatch.from_dense(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"cells \[1\] of the batch have no tokens"):
        empty.to("meta")


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("shared", [True, False], ids=["theta of genes", "theta of cells"])
def test_entries_that_stay_with_a_count_of_zero_add_exactly_nothing(monkeypatch, measured, sampled, shared):
    g = torch.Generator().manual_seed(1)
    batch = cells()
    if measured:
        batch = dataclasses.replace(batch, measured=torch.rand(6, N_GENES, generator=g) < 0.7)
    sample = sample_genes(torch.full((N_GENES,), 0.6, dtype=torch.float64), g) if sampled else None
    columns = slice(None) if sample is None else sample.gene_ids
    found = []
    for all_stay in (False, True):
        monkeypatch.setattr(
            "scldm.nn.likelihood.scored_entries", lambda c, s, d, a=all_stay: scored_entries(c, s, d, all_stay=a)
        )
        h = torch.Generator().manual_seed(2)
        logits = torch.randn(6, N_GENES, generator=h, dtype=torch.float64)[:, columns].requires_grad_()
        theta = torch.rand((N_GENES,) if shared else (6, N_GENES), generator=h, dtype=torch.float64)[..., columns] + 0.3
        theta.requires_grad_()
        known = None if batch.measured is None else batch.measured[:, columns]
        log_proportion = (logits if known is None else logits.masked_fill(~known, -torch.inf)).log_softmax(1)
        loss = nb_nll(batch, log_proportion, theta, sample)
        square = squared_error(batch, logits if known is None else logits.masked_fill(~known, 0.0), sample)
        (loss + square).sum().backward()
        found.append((loss.detach(), square.detach(), logits.grad, theta.grad))
    for plain, fixed in zip(*found, strict=True):
        torch.testing.assert_close(fixed, plain, rtol=1e-12, atol=1e-12)
    kept, stayed = (len(scored_entries(batch, sample, torch.float64, all_stay=a)[0]) for a in (False, True))
    assert (kept < stayed) == (measured or sampled)
