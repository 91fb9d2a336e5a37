"""Adapters: the network starts as it was, only they are trained, and merged weights compute the same."""

from __future__ import annotations

import pytest
import torch
from helpers.models.small_models import CELL_TYPES, GENES, random_weights, vae_config

from scldm.checkpoints.start_from import Started, adapt
from scldm.data.batch import CellBatch
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE
from scldm.optim.config import LoraConfig
from scldm.optim.lora import add_adapters, merged

LORA = LoraConfig(rank=3, alpha=6.0)
N_CLASSES = {"cell_type": len(CELL_TYPES.classes)}


def new_dit() -> DiT:
    return random_weights(DiT(DiTConfig(d_model=12, n_layers=2, n_heads=2), n_latent_tokens=3, latent_width=4,
                              n_classes=N_CLASSES), seed=3)  # fmt: skip


def new_vae() -> VAE:
    return random_weights(VAE(vae_config(input="count_aware", gene_bias=True, genes_seq_len=None), n_genes=len(GENES)))


def predict(dit: DiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 3, 4, generator=generator), torch.tensor([0.2, 0.7])
    return dit(x_t, t, {"cell_type": torch.tensor([1, 2])})


def train_a_little(module: torch.nn.Module, loss) -> None:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_the_network_starts_as_it_was_and_only_what_is_named_is_trained():
    dit = new_dit()
    before, state = predict(dit), {k: v.clone() for k, v in dit.state_dict().items()}
    names = add_adapters(dit, LORA, seed=0, also=["labels.label_cell_type.weight"])
    assert torch.equal(predict(dit), before)
    assert {n.rpartition(".")[2] for n in names} == {"a", "b", "weight"}
    train_a_little(dit, lambda: predict(dit).square().sum())
    assert not torch.allclose(predict(dit), before, atol=1e-4)
    out = merged(dit.state_dict(), LORA)
    changed = {k for k in state if not torch.equal(out[k], state[k])}
    expected = {f"blocks.{i}.{layer}.weight" for i in (0, 1)
                for layer in ("attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip
    assert changed == {*expected, "labels.label_cell_type.weight"}


def test_merged_weights_of_a_flow_compute_the_same():
    dit = new_dit()
    add_adapters(dit, LORA, seed=0)
    train_a_little(dit, lambda: predict(dit).square().sum())
    plain = new_dit()
    plain.load_state_dict(merged(dit.state_dict(), LORA))
    assert torch.allclose(predict(plain), predict(dit), rtol=0, atol=1e-6)
    a, b = (dit.blocks[0].attention.qkv.parametrizations.weight[0].__getattr__(n) for n in "ab")
    change = plain.blocks[0].attention.qkv.weight - new_dit().blocks[0].attention.qkv.weight
    assert torch.allclose(change, 2.0 * b @ a, atol=1e-6), "alpha / rank is 2"
    assert torch.linalg.matrix_rank(change) == LORA.rank


def cells() -> CellBatch:
    counts = torch.tensor([[3.0, 0, 1, 0, 2, 5], [0, 4, 1, 1, 0, 0]])
    cell, gene = counts.nonzero(as_tuple=True)
    offsets = torch.tensor([0, int((cell == 0).sum()), len(cell)])
    sizes = counts.sum(1)
    return CellBatch(offsets, gene, counts[cell, gene], sizes, {}, torch.arange(2), torch.ones(2))


@pytest.mark.parametrize("new_genes", [0, 2])
def test_merged_weights_of_a_vae_compute_the_same_and_embeddings_are_trained_if_genes_are_new(new_genes):
    vae, batch = new_vae(), cells()
    started = Started(genes={"kept": 6 - new_genes, "new": new_genes, "dropped": 0})
    adapt(vae, LORA, started, seed=0)
    assert vae.gene_embedding.requires_grad == bool(new_genes)
    assert vae.log_theta.requires_grad

    def mu() -> torch.Tensor:
        return vae.decode(vae.encode(batch), batch.library_size).mu

    train_a_little(vae, lambda: mu().square().mean())
    plain = new_vae()
    plain.load_state_dict(merged(vae.state_dict(), LORA))
    again = plain.decode(plain.encode(batch), batch.library_size).mu
    assert torch.allclose(again, mu(), rtol=1e-5, atol=1e-6)
    assert started.adapters["trained"] == sum(p.numel() for p in vae.parameters() if p.requires_grad)


def test_the_adapters_are_those_of_the_seed():
    first, same, other = new_dit(), new_dit(), new_dit()
    for dit, seed in ((first, 0), (same, 0), (other, 1)):
        add_adapters(dit, LORA, seed=seed)
    key = "blocks.1.mlp.up.parametrizations.weight.0.a"
    assert torch.equal(first.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
