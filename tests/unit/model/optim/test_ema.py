"""The moving average follows its rule, survives a restart, and restores the module's weights."""

import pytest
import torch
from helpers.models.upstream_fixtures import load_fixture
from parity.kinds.upstream_schedules import upstream_ema_decay
from torch import nn

from scldm.optim.config import EMAConfig
from scldm.optim.ema import EMA, ema_decay


def set_weight(module: nn.Module, value: torch.Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(value)


@pytest.mark.parametrize("index", range(3))
def test_upstreams_averages_are_reproduced(index):
    fixture = load_fixture("schedules_optim_ema")
    case = fixture.facts["ema"][index]
    online, recorded = fixture[f"ema/{index}/online"], fixture[f"ema/{index}/ema"]
    module = nn.Linear(3, 2, bias=False)
    set_weight(module, fixture[f"ema/{index}/w0"])
    ema = EMA(module, EMAConfig())
    for call, (weight, expected) in enumerate(zip(online, recorded, strict=True), start=1):
        set_weight(module, weight)
        decay = upstream_ema_decay(call, **case["kwargs"])
        if decay is not None:
            ema.average(decay)
        torch.testing.assert_close(ema.shadow["weight"], expected, rtol=1e-5, atol=1e-6)


def test_upstreams_decay_is_reproduced():
    fixture = load_fixture("schedules_optim_ema")
    steps, values = (fixture[f"ema/default_decay/{key}"].tolist() for key in ("step", "value"))
    assert [ema_decay(step, decay=0.9999, start=10_000) for step in steps] == pytest.approx(values, abs=1e-6)
    for case in fixture.facts["ema"]:
        beta, after = case["kwargs"]["beta"], case["kwargs"]["update_after_step"]
        recorded = fixture[f"ema/{case['i']}/decay_after"].tolist()
        ours = [ema_decay(call, decay=beta, start=after) for call in range(1, len(recorded) + 1)]
        assert ours == pytest.approx(recorded, abs=1e-6)


def test_before_the_start_the_average_is_a_copy_and_after_it_is_not():
    module = nn.Linear(2, 2)
    ema = EMA(module, EMAConfig(decay=0.9, start=3))
    for step in range(1, 7):
        set_weight(module, torch.full((2, 2), float(step)))
        ema.update(step)
        assert bool((ema.shadow["weight"] == step).all()) == (step <= 4)


def test_it_updates_on_every_nth_step_only():
    module = nn.Linear(1, 1)
    ema = EMA(module, EMAConfig(every=3, start=100))
    for step in range(1, 8):
        set_weight(module, torch.tensor([[float(step)]]))
        ema.update(step)
    assert ema.shadow["weight"].item() == 6


def test_a_resumed_average_equals_an_uninterrupted_one():
    def train(module: nn.Module, ema: EMA, steps: range) -> None:
        for step in steps:
            set_weight(module, torch.full((3, 2), float(step)).sin())
            ema.update(step)

    config = EMAConfig(decay=0.9, every=2, start=4)
    module = nn.Linear(2, 3)
    whole = EMA(module, config)
    train(module, whole, range(1, 21))
    module = nn.Linear(2, 3)
    stopped = EMA(module, config)
    train(module, stopped, range(1, 10))
    state = {name: tensor.clone() for name, tensor in stopped.state_dict().items()}
    resumed = EMA(nn.Linear(2, 3), config)
    resumed.load_state_dict(state)
    train(resumed.module, resumed, range(10, 21))
    assert torch.equal(whole.shadow["weight"], resumed.shadow["weight"])


def test_the_shadow_of_a_bfloat16_module_is_fp32_and_moves_by_less_than_bfloat16_can():
    module = nn.Linear(1, 1).bfloat16()
    set_weight(module, torch.ones(1, 1))
    ema = EMA(module, EMAConfig())
    set_weight(module, torch.full((1, 1), 2.0))
    ema.average(0.9999)
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].item() == pytest.approx(1.0001, abs=1e-7)


def test_buffers_are_averaged_and_integer_buffers_copied():
    module = nn.BatchNorm1d(2)
    ema = EMA(module, EMAConfig())
    module.running_mean.fill_(1.0)
    module.num_batches_tracked.fill_(7)
    ema.average(0.5)
    assert ema.shadow["running_mean"].tolist() == [0.5, 0.5]
    assert ema.shadow["num_batches_tracked"].item() == 7


def test_a_swapped_module_gets_its_weights_back_after_an_error():
    module = nn.Linear(2, 2)
    ema = EMA(module, EMAConfig())
    own = torch.full((2, 2), 5.0)
    set_weight(module, own)
    with pytest.raises(RuntimeError), ema.swapped(module):  # noqa: PT012
        assert torch.equal(module.weight, ema.shadow["weight"])
        raise RuntimeError
    assert torch.equal(module.weight, own)


def test_the_average_of_another_module_is_refused():
    with pytest.raises(KeyError, match="missing"):
        EMA(nn.Linear(2, 2), EMAConfig()).load_state_dict({"other": torch.zeros(1)})
