"""Presets have the sizes that are known of upstream's models, and can be built."""

import math

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.job import TrainFlowConfig, TrainVaeConfig
from scldm.api.presets import FlowRecipe, UnknownPresetError, preset, preset_names
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

# Parameters in millions: reference figures, to the digits that they are given with. A model's counts are within half of
# the last digit, and one padding row of ours or upstream's.
VAES = {
    "upstream_default": 0.79,
    "dentate_gyrus": 3.42,
    "census_20m": 23.8,
    "census_70m": 76.1,
    "census_270m": 266.0,
    "cd4": 15.3,
}
FLOWS = {"dentate_gyrus": 9.77, "cd4": 44.3}


def millions(module: nn.Module) -> float:
    """Parameters, frozen positions among them, as upstream counts them."""
    frozen = [buffer for name, buffer in module.named_buffers() if name == "positions"]
    return sum(tensor.numel() for tensor in (*module.parameters(), *frozen)) / 1e6


def new_dit(flow: FlowRecipe) -> DiT:
    tokens, width = flow.latent_shape
    with torch.device("meta"):
        return DiT(flow.model, n_latent_tokens=tokens, latent_width=width, n_classes=flow.n_classes)


def half_of_the_last_digit(figure: float) -> float:
    digits = len(str(figure).partition(".")[2])
    return 0.5 * 10**-digits if figure != 266.0 else 0.5  # given as 266


@pytest.mark.parametrize("name", VAES)
def test_an_autoencoder_has_the_parameters_that_upstream_states(name):
    recipe = preset(name).vae
    assert recipe is not None
    assert recipe.parameters == VAES[name]
    with torch.device("meta"):
        vae = VAE(recipe.model, n_genes=recipe.n_genes)
    pad_rows = (2 * recipe.model.d_model + 1) / 1e6  # of embeddings and theta; upstream's tables have them
    assert millions(vae) == pytest.approx(VAES[name], abs=half_of_the_last_digit(VAES[name]) + pad_rows)


@pytest.mark.parametrize("name", FLOWS)
def test_a_dit_has_the_parameters_that_upstream_states(name):
    recipe = preset(name).flow
    assert recipe is not None
    assert recipe.parameters == FLOWS[name]
    assert millions(new_dit(recipe)) == pytest.approx(FLOWS[name], abs=half_of_the_last_digit(FLOWS[name]))


@pytest.mark.parametrize("name", preset_names())
def test_a_flow_fits_the_latents_of_its_autoencoder(name):
    found = preset(name)
    assert found.name == name
    assert found.vae is not None
    if found.flow is not None:
        model = found.vae.model
        assert found.flow.latent_shape == (model.n_latent_tokens, model.latent_width)
        out = new_dit(found.flow)(
            torch.empty(2, *found.flow.latent_shape, device="meta"), torch.empty(2, device="meta"), {}
        )
        assert math.prod(out.shape) == 2 * math.prod(found.flow.latent_shape)


def test_the_table_of_sizes_is_complete():
    assert set(VAES) == set(preset_names())
    assert set(FLOWS) == {name for name in preset_names() if (flow := preset(name).flow) and flow.parameters}


@pytest.mark.parametrize("name", preset_names())
def test_the_command_prints_sections_that_a_job_file_may_hold_and_that_build_the_preset(name):
    result = CliRunner().invoke(app, ["presets", name])
    assert result.exit_code == 0, result.output
    sections = yaml.safe_load(result.output)
    assert TrainVaeConfig.model_validate(sections["train_vae"]).model == preset(name).vae.model
    if (flow := preset(name).flow) is not None:
        train_flow = TrainFlowConfig.model_validate(sections["train_flow"])
        assert (train_flow.model, train_flow.flow) == (flow.model, flow.path)
        assert train_flow.train.optimizer == flow.optimizer


def test_the_command_lists_all_and_refuses_what_it_does_not_know():
    listed = CliRunner().invoke(app, ["presets"])
    assert [line.split()[0] for line in listed.output.splitlines()] == list(preset_names())
    unknown = CliRunner().invoke(app, ["presets", "cd5"])
    assert unknown.exit_code == 2
    assert "did you mean cd4?" in unknown.output


def test_an_unknown_preset_names_what_is_near():
    with pytest.raises(UnknownPresetError, match=r"no preset 'census_60m'; did you mean census_[27]0m"):
        preset("census_60m")
    with pytest.raises(UnknownPresetError, match="known: upstream_default, dentate_gyrus"):
        preset("zzz")
