"""The decoder has sizes of its own, as upstream's has; what is not set follows the encoder and changes no version."""

from __future__ import annotations

import pytest
import torch
from helpers.models.plain_upstream_vae import PlainVAE, Side
from helpers.models.small_models import random_weights, vae_config
from pydantic import ValidationError

from scldm.checkpoints.convert.export import upstream_vae_values
from scldm.checkpoints.upstream.config import vae_config_from_upstream
from scldm.checkpoints.upstream.names_vae import vae_state_from_upstream, vae_state_to_upstream
from scldm.data.batch import CellBatch
from scldm.nn.config import ScviConfig, VAEConfig
from scldm.nn.flops import decoder_flops, encoder_flops, vae_flops
from scldm.nn.scvi import ScviVAE
from scldm.nn.vae import VAE

COUNTS = torch.tensor([[3.0, 0, 1, 0, 0, 9], [0, 0, 0, 2, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.float64)
DIFFERENT = [
    {"n_layer_dec": 2},
    {"n_layer": 2, "n_layer_dec": 0},
    {"n_head_dec": 4},
    {"n_head_cross_dec": 2},
    {"multiple_of_dec": 16},
    {"bias_dec": True},
    {"eps_dec": 0.1},
    {"shared": False, "n_embed_dec": 12, "n_head_cross_dec": 3},
    {"shared": False, "n_embed_dec": 4, "n_layer_dec": 3, "n_head_dec": 1, "n_head_cross_dec": 2, "bias_dec": True},
]


def upstream_values(**choices) -> dict:
    return {**upstream_vae_values(vae_config(multiple_of=4)), **choices}


@pytest.mark.parametrize("choices", [{}, *DIFFERENT], ids=str)
def test_a_decoder_of_other_sizes_computes_what_upstreams_formulas_give(choices):
    values = upstream_values(**choices)
    config = vae_config_from_upstream(values, genes_seq_len=6)
    vae = random_weights(VAE(config, n_genes=6)).double()
    upstream = vae_state_to_upstream(vae.state_dict(), config)
    sides = [
        Side(*(values.get(f"{name}{suffix}", values[name]) for name in ("n_head", "n_head_cross", "eps")))
        for suffix in ("", "_dec")
    ]
    plain = PlainVAE(upstream, *sides)
    z = vae.encode(CellBatch.from_dense(COUNTS))
    mu = vae.decode(z, COUNTS.sum(1)).mu
    for counts, own_z, own_mu in zip(COUNTS, z, mu, strict=True):
        torch.testing.assert_close(own_z, plain.encode(counts, 6))
        torch.testing.assert_close(own_mu, plain.mean(own_z, counts.sum().item()))
    # The way back, with upstream's names alone.
    again = VAE(config, n_genes=6).double()
    again.load_state_dict(vae_state_from_upstream(upstream, pads=True))
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))
    assert vae_config_from_upstream(upstream_vae_values(config), genes_seq_len=6) == config


def test_what_is_not_set_is_not_written_so_that_earlier_runs_keep_their_versions():
    assert "decoder" not in VAEConfig().model_dump(mode="json")
    assert "decoder" not in VAEConfig().model_dump(mode="json", exclude_defaults=True)
    assert VAEConfig(n_layers=1, decoder={"n_layers": 2}).model_dump()["decoder"] == {"n_layers": 2}


def test_a_decoder_that_repeats_the_encoder_is_the_same_configuration():
    same = VAEConfig(n_layers=3, decoder={"n_layers": 3, "n_heads": 4, "eps": 1e-8})
    assert same == VAEConfig(n_layers=3)
    assert same.model_dump() == VAEConfig(n_layers=3).model_dump()


def test_a_written_configuration_reads_back():
    config = VAEConfig(d_model=32, shared_embedding=False, decoder={"d_model": 48, "n_heads": 6})
    assert VAEConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"decoder": {"n_heads": 3}}, r"decoder\.d_model \(32\) must be a multiple of decoder\.n_heads \(3\)"),
        ({"decoder": {"d_model": 64}}, "set shared_embedding to false"),
        ({"decoder": {"head_eps": 0.1}}, r"head_eps is of a gaussian head"),
        ({"decoder": {"n_latent_tokens": 8}}, "n_latent_tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(choices, message):
    with pytest.raises(ValidationError, match=message):
        VAEConfig(**choices)


def test_gradients_reach_a_decoder_of_another_width():
    config = vae_config(shared_embedding=False, decoder={"d_model": 12, "n_layers": 2}, n_heads=2)
    vae = random_weights(VAE(config, n_genes=6)).double()
    vae(CellBatch.from_dense(COUNTS)).sum().backward()
    missing = [name for name, p in vae.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_the_arithmetic_counts_each_side_with_its_own_blocks():
    equal, deep = VAEConfig(), VAEConfig(decoder={"n_layers": 6})
    facts = {"n_genes": 100, "expressed": 10}
    assert encoder_flops(deep, expressed=10) == encoder_flops(equal, expressed=10)
    assert decoder_flops(deep, n_genes=100) > decoder_flops(equal, n_genes=100)
    assert vae_flops(deep, **facts) - vae_flops(equal, **facts) == pytest.approx(
        2 * (vae_flops(VAEConfig(n_layers=4), **facts) - vae_flops(equal, **facts)) / 2
    )


def test_the_mlp_vae_has_a_decoder_of_its_own_depth_and_width():
    vae = ScviVAE(ScviConfig(n_hidden=8, decoder={"n_hidden": 5, "n_layers": 3}), n_genes=6).eval()
    assert len(vae.encoder) == 4
    assert len(vae.decoder) == 12
    assert vae.logits.in_features == 5
    assert vae.decode(torch.zeros(2, 10), torch.ones(2)).mu.shape == (2, 6)
