"""CautiousAdamW takes the recorded steps of upstream's, and torch's without caution."""

import pytest
import torch
from helpers.models.upstream_fixtures import Fixture, load_fixture
from parity.kinds.upstream_schedules import upstream_wsd
from torch import nn

from scldm.optim.adamw import CautiousAdamW

RECORDED_SCHEDULE = {
    "num_training_steps": 20,
    "num_warmup_steps": 4,
    "init_div_factor": 10,
    "fract_decay": 0.5,
    "decay_type": "sqrt",
}


def replay(fixture: Fixture, case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Trajectory of A and b, and the loss before each step."""
    settings = dict(case["kwargs"])
    settings.setdefault("caution", False)
    a, b = (nn.Parameter(fixture[f"adamw/in/{name}"].clone()) for name in ("A0", "b0"))
    optimizer = CautiousAdamW([a, b], **settings)
    path_a, path_b, losses = [], [], []
    for step in range(len(fixture[f"adamw/{case['i']}/loss"])):
        if case["scheduler"]:
            optimizer.param_groups[0]["lr"] = settings["lr"] * upstream_wsd(step, **RECORDED_SCHEDULE)
        loss = (torch.tanh(fixture["adamw/in/X"] @ a + b) - fixture["adamw/in/Y"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path_a.append(a.detach().clone())
        path_b.append(b.detach().clone())
        losses.append(loss.detach())
    return torch.stack(path_a), torch.stack(path_b), torch.stack(losses)


@pytest.mark.parametrize("index", range(5))
def test_the_recorded_steps_of_upstream_are_taken(index):
    fixture = load_fixture("schedules_optim_ema")
    path_a, path_b, losses = replay(fixture, fixture.facts["adamw"][index])
    torch.testing.assert_close(path_a, fixture[f"adamw/{index}/A"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path_b, fixture[f"adamw/{index}/b"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses, fixture[f"adamw/{index}/loss"], rtol=1e-5, atol=1e-6)


def quadratic_run(optimizer_of, n_steps: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    optimizer = optimizer_of(params)
    for step in range(n_steps):
        optimizer.zero_grad()
        # The second parameter has no gradient on odd steps, so that the two count different numbers of steps.
        used = params if step % 2 == 0 else params[:1]
        sum((p - 1).square().sum() for p in used).backward()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_caution_it_is_torchs_adamw(amsgrad):
    settings = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": amsgrad}
    ours = quadratic_run(lambda params: CautiousAdamW(params, caution=False, **settings), 7)
    theirs = quadratic_run(lambda params: torch.optim.AdamW(params, **settings), 7)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_coordinate_whose_momentum_opposes_its_gradient_stays():
    p = nn.Parameter(torch.zeros(2))
    optimizer = CautiousAdamW([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.tensor([-0.1, 1.0])  # too small to turn the momentum of the first coordinate
    optimizer.step()
    assert p[0] == before[0]
    assert p[1] < before[1]


def test_a_resumed_optimizer_takes_the_same_steps():
    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))]

    def advance(optimizer: CautiousAdamW, values: list[nn.Parameter], n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            values[0].sin().sum().backward()
            optimizer.step()

    whole, first, second = params(), params(), params()
    advance(CautiousAdamW(whole), whole, 6)
    stopped = CautiousAdamW(first)
    advance(stopped, first, 3)
    second[0].data.copy_(first[0])
    resumed = CautiousAdamW(second)
    resumed.load_state_dict(stopped.state_dict())
    advance(resumed, second, 3)
    assert torch.equal(whole[0], second[0])


def test_a_negative_learning_rate_is_an_error():
    with pytest.raises(ValueError, match=r"lr \(-1\)"):
        CautiousAdamW([nn.Parameter(torch.zeros(1))], lr=-1)
