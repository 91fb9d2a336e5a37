"""Control cells that training cells start at, and the field that carries them."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.models.label_values import number, sets

from scldm.flow.config import ControlStart, PathConfig, SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.flow.transport import MATCHED, ControlCells, FromControls, nearest_assignment, start_problem
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT
from scldm.random import generator


def latents(n, seed=0):
    return torch.randn(n, 3, 2, generator=generator(seed, 7))


def ids(*values):
    return torch.tensor(values)


def screen():
    """Three patients; controls (drug 0) of the first two."""
    conditions = {"drug": ids(0, 0, 0, 0, 0), "patient": ids(0, 0, 0, 1, 1)}
    return ControlCells.of(latents(5), conditions, "drug")


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_assignment_has_the_smallest_sum_of_squared_distances(n):
    cells, controls = latents(n, 1), latents(n, 2)
    cost = lambda order: float(((cells - controls[list(order)]) ** 2).sum())  # noqa: E731
    best = min(itertools.permutations(range(n)), key=cost)
    found = nearest_assignment(cells, controls).tolist()
    assert sorted(found) == list(range(n))
    assert cost(found) == pytest.approx(cost(best))


def test_a_cell_starts_at_a_control_cell_with_the_same_other_labels():
    cells = {"drug": ids(1, 1, 2, 1, 2), "patient": ids(0, 0, 0, 1, 1)}
    start = screen().match(latents(5, 3), cells, torch.ones(5, dtype=torch.bool), generator(0))
    assert set(start[:3].tolist()) <= {0, 1, 2}
    assert set(start[3:].tolist()) <= {3, 4}


def test_cells_that_are_not_chosen_or_have_no_controls_start_at_noise():
    cells = {"drug": ids(1, 1, 1), "patient": ids(0, 2, 0)}
    start = screen().match(latents(3, 3), cells, torch.tensor([True, True, False]), generator(0))
    assert (start >= 0).tolist() == [True, False, False]


def test_each_treatment_takes_every_control_cell_as_often_as_any_other():
    """Two treatments move cells apart; matched together, each would take the controls on its side."""
    controls = ControlCells.of(torch.linspace(-1, 1, 40).view(-1, 1, 1), {"drug": torch.zeros(40).long()}, "drug")
    moved = torch.cat([torch.full((40, 1, 1), -9.0), torch.full((40, 1, 1), 9.0)])
    drugs = {"drug": torch.arange(80) // 40 + 1}
    start = controls.match(moved, drugs, torch.ones(80, dtype=torch.bool), generator(0))
    assert sorted(start[:40].tolist()) == sorted(start[40:].tolist()) == list(range(40))


def test_more_cells_than_controls_use_each_control_about_as_often():
    start = screen().match(
        latents(8, 3), {"drug": ids(*[1] * 8), "patient": ids(*[0] * 8)}, torch.ones(8, dtype=torch.bool), generator(0)
    )
    assert sorted(start.bincount(minlength=3)[:3].tolist()) == [2, 3, 3]


def test_many_cells_are_matched_in_parts():
    n = MATCHED + 3
    one = {"drug": torch.ones(n).long(), "patient": torch.zeros(n).long()}
    start = screen().match(latents(n, 3), one, torch.ones(n, dtype=torch.bool), generator(0))
    assert bool((start >= 0).all())


def network(**more):
    torch.manual_seed(0)
    dit = DiT(DiTConfig(d_model=16, n_layers=1, n_heads=2), n_latent_tokens=3, latent_width=2,
              n_classes={"drug": 2}, from_controls=True, **more)  # fmt: skip
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator(1))
    return dit


def test_the_two_fields_are_told_apart_cell_by_cell():
    dit, x, t, drug = network(), latents(4), torch.rand(4, generator=generator(2)), {"drug": ids(0, 1, 1, 2)}
    flags = torch.tensor([True, False, True, False])
    mixed, noise, control = dit(x, t, drug, flags), dit(x, t, drug), FromControls(dit)(x, t, drug)
    torch.testing.assert_close(mixed, torch.where(flags.view(-1, 1, 1), control, noise))
    assert not torch.allclose(noise, control)


def test_a_solver_sees_the_field_from_controls():
    dit, x, drug = network(), latents(4), {"drug": ids(0, 1, 1, 2)}
    t = torch.full((4,), 0.3)
    shared = FromControls(dit).at_one_time(drug)(x, t)
    torch.testing.assert_close(shared, FromControls(dit)(x, t, drug))
    config = SamplerConfig(solver="euler", steps=1, guidance=1.0)
    moved = sample_latents(FromControls(dit), x, drug, config, PathConfig())
    torch.testing.assert_close(moved, x + FromControls(dit)(x, torch.zeros(4), drug))


def test_a_network_from_noise_only_has_no_field_from_controls():
    dit = DiT(DiTConfig(d_model=16, n_layers=1, n_heads=2), n_latent_tokens=3, latent_width=2, n_classes={"drug": 2})
    assert "from_controls" not in dit.state_dict()
    with pytest.raises(ValueError, match="trained from noise only"):
        FromControls(dit)(latents(2), torch.zeros(2), {"drug": ids(0, 1)})


def test_a_start_that_was_not_trained_is_refused_with_the_way_out():
    half, alone = (ControlStart(label="drug", control="none", share=s) for s in (0.5, 1.0))
    assert start_problem(half, "control") is start_problem(half, "noise") is start_problem(None, "latents") is None
    assert start_problem(alone, "control") is None
    assert "train_flow.start" in str(start_problem(None, "control"))
    for wanted in ("noise", "latents"):
        assert "start=control" in str(start_problem(alone, wanted))


def test_cells_whose_other_labels_have_equal_values_start_at_the_same_controls():
    """3.0 and 3 are one dose, and B+A is A+B: texts of one value have one id."""
    dose, drugs = number(), sets(zero=["none"], classes=("A", "A+B", "B", "none"))
    codes = lambda label, *names: torch.from_numpy(label.encode(names))  # noqa: E731
    given = {"drugs": codes(drugs, "A+B", "A+B", "A"), "dose": codes(dose, "3", "3.0", "3"), "drug": ids(0, 0, 0)}
    controls = ControlCells.of(latents(3), given, "drug")
    asked = {"drugs": codes(drugs, "B+A", "none+A", "B"), "dose": codes(dose, "3e0", "03", "3"), "drug": ids(1, 1, 1)}
    found = controls.match(latents(3, 1), asked, torch.ones(3, dtype=torch.bool), generator(0, 1)).tolist()
    assert found[0] in (0, 1)
    assert found[1:] == [2, -1]
