"""Learning rates of parameters, and of rows of one, are right under every ZeRO stage, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.training import slowed_toy
from helpers.training.ranks import start
from helpers.training.slowed_toy import PLAIN, RATES, by_hand
from helpers.training.toy_training import Toy

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("rates")
    for phase, world_size in (("straight", 2), ("resumed", 1)):
        codes = start(place, getattr(slowed_toy, phase), world_size)
        assert codes == [0] * world_size, (place / "log").read_text()[-3000:]
    return place


def weights(folder: Path, name: str, run: str) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(v) for k, v in json.loads((folder / name / run / "done.json").read_text()).items()}


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_is_the_given_fraction_of_the_step_without_rates(folder, name):
    before = {n: p.detach() for n, p in Toy(None, []).module.named_parameters()}
    slow, plain = (weights(folder, name, run) for run in ("one", "one_plain"))
    for n in before:
        factor = RATES.get(n, 1.0)
        factor = factor[:, None] if isinstance(factor, torch.Tensor) else factor
        moved = plain[n] - before[n]
        assert moved.abs().max() > 1e-4
        torch.testing.assert_close(slow[n] - before[n], factor * moved, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in PLAIN if "bf16" not in n])
@pytest.mark.parametrize("run", ["all", "bent"])
def test_a_training_is_that_of_adamw_written_out_with_a_rate_for_each_element(folder, name, run):
    """`bent`: stopped, and resumed on another number of workers."""
    found, expected = weights(folder, name, run), by_hand()
    for n, value in expected.items():
        torch.testing.assert_close(found[n], value, rtol=0, atol=2e-6)
