"""The numbers of parameters that a training records."""

from __future__ import annotations

from helpers.models.small_models import CELL_TYPES, write_flow

from pipeline.training.tasks.base import parameter_facts
from scldm.checkpoints.native import load_flow
from scldm.checkpoints.start_from import freeze
from scldm.optim.config import LoraConfig
from scldm.optim.lora import add_adapters


def flow(tmp_path):
    dit = load_flow(write_flow(tmp_path / "flow", CELL_TYPES)).dit
    for p in dit.parameters():
        p.requires_grad_(True)
    return dit, sum(p.numel() for p in dit.parameters())


def test_a_training_of_everything_has_one_number(tmp_path):
    dit, n = flow(tmp_path)
    assert parameter_facts(dit) == {"n_parameters": n}


def test_adapters_are_trained_and_are_no_part_of_the_model(tmp_path):
    dit, n = flow(tmp_path)
    names = add_adapters(dit, LoraConfig(rank=2), seed=0)
    shapes = {k: p.numel() for k, p in dit.named_parameters()}
    assert parameter_facts(dit) == {"n_parameters": n, "n_trained": sum(shapes[k] for k in names)}


def test_frozen_parts_are_in_the_model_and_not_trained(tmp_path):
    dit, n = flow(tmp_path)
    frozen = freeze(dit, ["input"])
    left = n - sum(p.numel() for k, p in dit.named_parameters() if k in frozen)
    assert parameter_facts(dit) == {"n_parameters": n, "n_trained": left}
