"""The learning rate is continuous and ends at its final value; upstream's rule is reproduced for comparison."""

from itertools import pairwise

import pytest
from helpers.models.upstream_fixtures import load_fixture
from parity.kinds.upstream_schedules import upstream_wsd

from scldm.optim.config import OptimizerConfig
from scldm.optim.schedule import learning_rate_factor

SHAPES = [
    OptimizerConfig(),
    OptimizerConfig(warmup=0.0, decay=1.0, final_factor=0.1),
    OptimizerConfig(warmup=0.1, decay=1.0, final_factor=0.0),
    OptimizerConfig(warmup=0.2, decay=0.2, decay_type="sqrt"),
    OptimizerConfig(warmup=0.1, decay=1.0, decay_type="sqrt", final_factor=0.1),
    OptimizerConfig(warmup=0.0, decay=0.0),
]


@pytest.mark.parametrize("config", SHAPES)
def test_the_schedule_has_no_jumps(config):
    """The largest change between neighbours shrinks as steps get finer: as 1/n, or its root where sqrt decay begins."""
    for n in (1_000, 100_000):
        factors = [learning_rate_factor(step, n, config) for step in range(n + 1)]
        largest = max(abs(b - a) for a, b in pairwise(factors))
        assert largest <= (2.5 * n**-0.5 if config.decay_type == "sqrt" else 20 / n)


@pytest.mark.parametrize("config", SHAPES)
def test_the_schedule_peaks_at_one_and_ends_at_the_final_factor(config):
    factors = [learning_rate_factor(step, 1_000, config) for step in range(1_001)]
    assert max(factors) == 1.0
    assert min(factors) > 0 or config.final_factor == 0
    end = config.final_factor if config.decay else 1.0
    assert factors[-1] == pytest.approx(end, abs=1e-12)
    assert learning_rate_factor(5_000, 1_000, config) == pytest.approx(end, abs=1e-12)


def test_the_hold_lies_between_warm_up_and_decay():
    config = OptimizerConfig(warmup=0.1, decay=0.3)
    assert learning_rate_factor(99, 1_000, config) < 1
    assert all(learning_rate_factor(step, 1_000, config) == 1 for step in range(100, 701))
    assert learning_rate_factor(702, 1_000, config) < 1


def test_a_negative_step_is_an_error():
    with pytest.raises(ValueError, match=r"step \(-1\)"):
        learning_rate_factor(-1, 10, OptimizerConfig())


def test_upstreams_schedule_is_reproduced_exactly():
    fixture = load_fixture("schedules_optim_ema")
    for case in fixture.facts["wsd"]:
        steps, values = (fixture[f"wsd/{case['i']}/{key}"].tolist() for key in ("step", "value"))
        ours = [upstream_wsd(step, **case["kwargs"]) for step in steps]
        assert ours == pytest.approx(values, abs=1e-12), case
