"""Distilled flows: jumps along the teacher's trajectories, and what such a network cannot do."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from helpers.models.small_models import random_weights

from scldm.flow.config import ControlStart, Distilled, PathConfig, SamplerConfig
from scldm.flow.distilled import (
    jump_losses,
    jump_times,
    sample_distilled,
    sampler_problems,
    teacher_problems,
    teacher_states,
    whole_flow_problem,
)
from scldm.flow.sampler import sample_latents
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT

SHAPE, PATH = (3, 4), PathConfig()
TWO = Distilled(evaluations=2, guidance=2.0, teacher="abc")


@pytest.fixture
def dit() -> DiT:
    network = DiT(DiTConfig(d_model=12, n_layers=1, n_heads=2), n_latent_tokens=3, latent_width=4, n_classes={"a": 2})
    return random_weights(network).eval().requires_grad_(False)


def cells(n: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *SHAPE, generator=g), {"a": torch.randint(0, 3, (n,), generator=g)}


@pytest.mark.parametrize("evaluations", [1, 2, 4])
@pytest.mark.parametrize("path", ["linear", "vp"])
def test_trajectories_are_those_of_the_solver_at_the_ends_of_jumps(dit, evaluations, path):
    x0, ids = cells(5)
    states = teacher_states(dit, x0, ids, PathConfig(path=path), evaluations=evaluations, steps=8, scale=1.0)
    whole = sample_latents(dit, x0, ids, SamplerConfig(solver="adams", steps=8), PathConfig(path=path))
    assert states.shape == (5, evaluations + 1, *SHAPE)
    assert torch.equal(states[:, 0], x0)
    assert torch.equal(states[:, -1], whole)


def test_a_jump_of_one_step_of_the_solver_misses_nothing(dit):
    """The mean velocity of an Euler step is the velocity: where a jump is as short, the teacher is its own student."""
    x0, ids = cells(5)
    times = jump_times(4, PATH)
    ends = [x0]
    for t, t_next in pairwise(times):
        ends.append(ends[-1] + (t_next - t) * dit(ends[-1], torch.full((5,), t), ids))
    assert jump_losses(dit, torch.stack(ends, 1), ids, times).max() < 1e-6


def test_the_shorter_a_jump_the_less_the_teacher_itself_misses_its_trajectory(dit):
    x0, ids = cells(16)
    missed = []
    for n in (1, 2, 4):
        states = teacher_states(dit, x0, ids, PATH, evaluations=n, steps=64, scale=1.0)
        missed.append(float(jump_losses(dit, states, ids, jump_times(n, PATH))[:, 0].mean()))
    assert missed[0] > missed[1] > missed[2] > 0


def test_a_jump_starts_where_the_one_before_it_ended_and_aims_at_the_trajectory(dit):
    """The plain reference: each jump by hand, its start without a gradient."""
    x0, ids = cells(4)
    states, times = teacher_states(dit, x0, ids, PATH, evaluations=2, steps=8, scale=1.0), jump_times(2, PATH)
    middle = x0 + 0.5 * dit(x0, torch.zeros(4), ids)
    end = middle + 0.5 * dit(middle, torch.full((4,), 0.5), ids)
    found = jump_losses(dit, states, ids, times)
    torch.testing.assert_close(found[:, 0], (middle - states[:, 1]).square().flatten(1).mean(1))
    torch.testing.assert_close(found[:, 1], (end - states[:, 2]).square().flatten(1).mean(1))


def test_the_second_jump_teaches_nothing_to_the_first():
    network = DiT(DiTConfig(d_model=12, n_layers=1, n_heads=2), n_latent_tokens=3, latent_width=4, n_classes={"a": 2})
    random_weights(network)
    seen = []

    def model(x, t, ids):
        seen.append(x)
        return network(x, t, ids)

    x0, ids = cells(4)
    states = teacher_states(network, x0, ids, PATH, evaluations=2, steps=8, scale=1.0)
    jump_losses(model, states, ids, jump_times(2, PATH))
    assert not any(x.requires_grad for x in seen)


def test_training_brings_jumps_onto_the_trajectory(dit):
    student = DiT(dit.config, n_latent_tokens=3, latent_width=4, n_classes={"a": 2})
    student.load_state_dict(dit.state_dict())
    x0, ids = cells(64)
    states, times = teacher_states(dit, x0, ids, PATH, evaluations=1, steps=16, scale=1.0), jump_times(1, PATH)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = jump_losses(student, states, ids, times).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_samples_are_the_jumps_and_set_all_labels_of_a_cell_at_once():
    network = DiT(
        DiTConfig(d_model=12, n_layers=1, n_heads=2, strategy="mutually_exclusive"), n_latent_tokens=3, latent_width=4,
        n_classes={"a": 2, "b": 3},
    )  # fmt: skip
    random_weights(network).eval()
    x0, ids = cells(6)
    ids["b"] = torch.arange(6) % 4
    made = sample_distilled(network, x0, ids, TWO, PATH)
    with torch.no_grad():
        middle = x0 + 0.5 * network(x0, torch.zeros(6), ids)
        end = middle + 0.5 * network(middle, torch.full((6,), 0.5), ids)
    torch.testing.assert_close(made, end)


def test_the_solver_must_stop_where_jumps_end(dit):
    with pytest.raises(ValueError, match=r"steps \(6\) must be a multiple of evaluations \(4\)"):
        teacher_states(dit, *cells(2), PATH, evaluations=4, steps=6, scale=1.0)


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(guidance=2),
        SamplerConfig(solver="euler", steps=2, guidance={"a": 2}),
        SamplerConfig(guidance=2, temperature=0.5),
    ],
)
def test_a_sampler_that_asks_for_what_the_flow_does_is_taken(sampler):
    assert sampler_problems(TWO, sampler) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 1.0}, r"guidance \(1\): this flow was distilled with guidance 2"),
        ({"guidance": {"a": 3}}, r"guidance \(a 3\): this flow was distilled with guidance 2"),
        ({"guidance": 2.0, "solver": "rk4"}, r"solver \(rk4, 14 steps\): this flow was distilled to 2 evaluations"),
        ({"guidance": 2.0, "solver": "euler", "steps": 4}, r"solver \(euler, 4 steps\)"),
        ({"guidance": 2.0, "steps": 20}, r"solver \(adams, 20 steps\)"),
        ({"guidance": 2.0, "rtol": 1e-3}, r"rtol \(0.001\) is of dopri5"),
    ],
)  # fmt: skip
def test_a_sampler_that_asks_for_something_else_is_refused(settings, message):
    [problem] = sampler_problems(TWO, SamplerConfig.model_validate(settings))
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": PathConfig(prediction="noise")}, "predicts a velocity"),
        ({"start": ControlStart(label="a", control="c", share=1)}, "share below 1"),
        ({"guidance": {"tissue": 2}}, "knows no label tissue"),
        ({"guidance": {"a": 2, "b": 3}, "labels": ["a", "b"]}, "guided together"),
        ({"guidance": 2.0, "label_dropout": 0.0}, "needs a field without labels"),
        ({"distilled": TWO}, "this one was distilled"),
    ],
)
def test_a_flow_that_cannot_be_distilled_is_refused_with_a_remedy(given, message):
    fine = {"guidance": 1.0, "path": PATH, "labels": ["a"], "strategy": "joint", "label_dropout": 0.1, "start": None}
    assert teacher_problems(**fine) == []
    [problem] = teacher_problems(**fine | given)
    assert message in problem


def test_only_a_distilled_flow_is_refused_where_a_velocity_field_is_needed():
    assert whole_flow_problem(None, "x") is None
    assert "name the flow that it was distilled from" in str(whole_flow_problem(TWO, "x"))
