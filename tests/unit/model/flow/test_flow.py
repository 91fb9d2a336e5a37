"""Paths, losses and guidance equal upstream's records and follow their definitions."""

import pytest
import torch
from helpers.models.recorded_dit import CASES, dit_of
from helpers.models.upstream_fixtures import load_fixture
from parity.kinds.transport import DIFFUSION_NAMES, PATH_NAMES

from scldm.flow.config import PathConfig
from scldm.flow.guidance import guidance_terms, guided_prediction, guided_velocity, per_cell_prediction
from scldm.flow.objective import flow_loss, to_noise, to_score, to_velocity
from scldm.flow.path import (
    PATHS,
    sample_path,
    sample_times,
    sampling_interval,
    times_like,
    training_interval,
)
from scldm.flow.sde import SDEOptions, diffusion, sde_interval


def close(ours: torch.Tensor, recorded: torch.Tensor) -> None:
    torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", PATH_NAMES)
def test_coefficients_and_conversions_are_those_of_upstream(name):
    recorded = load_fixture("transport").under(f"coef/{name}/")
    config = PathConfig(path=PATH_NAMES[name])
    path, t, x = PATHS[config.path], recorded["t"], recorded["x"]
    times = times_like(t, x)
    for key in ("alpha", "d_alpha", "sigma", "d_sigma"):
        close(getattr(path, key)(t), recorded[key])
    close(path.d_log_alpha(t), recorded["d_alpha_alpha_ratio"])
    close(-path.d_log_alpha(times) * x, recorded["drift_mean"])
    close(path.score_weight(times), recorded["drift_var"])
    close(to_score(recorded["velocity"], x, t, config), recorded["score_from_velocity"])
    close(to_noise(recorded["velocity"], x, t, config), recorded["noise_from_velocity"])
    score = PathConfig(path=config.path, prediction="score")
    close(to_velocity(recorded["score_from_velocity"], x, t, score), recorded["velocity_from_score"])
    for theirs, ours in DIFFUSION_NAMES.items():
        expected = recorded[f"diffusion_{theirs}_norm0.7"]
        close(diffusion(times, SDEOptions(diffusion=ours, norm=0.7), config), expected.expand_as(times))


def test_points_targets_and_losses_are_those_of_upstream():
    fixture = load_fixture("transport")
    for case in fixture.facts["cases"]:
        _, name, prediction, weight, _ = case["key"].split("/")
        # Upstream ignores the weight of a velocity prediction, which our configuration refuses.
        weight = "none" if prediction == "velocity" else weight.lower()
        config = PathConfig(path=PATH_NAMES[name], prediction=prediction, weight=weight)
        shared = fixture.under(case["shared"])
        sample = sample_path(shared["x0"], fixture["in/x1"], shared["t"], config.path)
        close(sample.x_t, shared["xt"])
        close(sample.velocity, shared["ut"])
        close(flow_loss(shared["pred"], sample, shared["t"], config), fixture[f"{case['key']}/loss"])


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_the_derivatives(name):
    path, t = PATHS[name], torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (slope,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(t), slope)
    torch.testing.assert_close(path.d_log_alpha(t), path.d_alpha(t) / path.alpha(t))


@pytest.mark.parametrize("name", PATHS)
def test_noise_score_and_velocity_of_one_point_agree(name):
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    velocity, noise, score = (PathConfig(path=name, prediction=p) for p in ("velocity", "noise", "score"))
    sample = sample_path(x0, x1, t, name)
    torch.testing.assert_close(to_noise(sample.velocity, sample.x_t, t, velocity), x0)
    torch.testing.assert_close(to_velocity(x0, sample.x_t, t, noise), sample.velocity)
    score_value = to_score(x0, sample.x_t, t, noise)
    torch.testing.assert_close(to_velocity(score_value, sample.x_t, t, score), sample.velocity)
    assert flow_loss(x0, sample, t, noise).abs().max() == 0
    assert flow_loss(score_value, sample, t, score).abs().max() < 1e-25


def test_the_velocity_weight_turns_a_noise_error_into_a_velocity_error():
    torch.manual_seed(0)
    x0, x1, prediction = torch.randn(3, 6, 4, dtype=torch.float64).unbind()
    t = torch.linspace(0.2, 0.8, 6, dtype=torch.float64)
    noise = PathConfig(path="gvp", prediction="noise", weight="velocity")
    sample = sample_path(x0, x1, t, "gvp")
    as_velocity = to_velocity(prediction, sample.x_t, t, noise)
    expected = flow_loss(as_velocity, sample, t, PathConfig(path="gvp"))
    torch.testing.assert_close(flow_loss(prediction, sample, t, noise), expected)


def test_a_weight_for_a_velocity_prediction_is_refused():
    with pytest.raises(ValueError, match=r"weight \(likelihood\)"):
        PathConfig(weight="likelihood")


def test_intervals_are_those_of_upstream():
    facts = load_fixture("transport").facts["intervals"]
    for name, expected in facts.items():
        path, prediction, train, sample = name.split("/")
        config = PathConfig(path=PATH_NAMES[path], prediction=prediction)
        eps = [None if value.endswith("None") else float(value.partition("=")[2]) for value in (train, sample)]
        assert training_interval(config, eps=eps[0]) == pytest.approx(tuple(expected["{}"]))
        if eps[1] is not None:  # its own default fails
            assert sampling_interval(config, eps=eps[1]) == pytest.approx(tuple(expected['{"eval": true}']))


def test_stochastic_intervals_are_those_of_upstream():
    facts = load_fixture("transport").facts["intervals"]
    for name, expected in facts.items():
        path, prediction, _, sample = name.split("/")
        if sample.endswith("None"):
            continue
        config = PathConfig(path=PATH_NAMES[path], prediction=prediction)
        # Upstream has no distance from the ends for a velocity on these paths, and then divides by zero.
        eps = 0.0 if prediction == "velocity" and path != "VP" else float(sample.partition("=")[2])
        options = SDEOptions(eps=eps, diffusion="sbdm", last_step_size=0.04)
        key = '{"eval": true, "sde": true, "last_step_size": 0.04}'
        assert sde_interval(options, config) == pytest.approx(tuple(expected[key]))
        options = SDEOptions(eps=eps, diffusion="sigma", last_step_size=0.04)
        key = '{"eval": true, "sde": true, "diffusion_form": "sigma", "last_step_size": 0.04}'
        assert sde_interval(options, config) == pytest.approx(tuple(expected[key]))


def test_training_times_lie_in_their_interval():
    config = PathConfig(prediction="score")
    t = sample_times(1_000, config, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    assert 1e-3 <= t.min() < 0.02
    assert 0.98 < t.max() <= 0.999


class Spy:
    """A model that adds up its labels and remembers the sizes of its batches."""

    n_classes = {"a": 3, "b": 5}

    def __init__(self, strategy):
        self.strategy = strategy
        self.batch_sizes = []

    def __call__(self, x_t, t, conditions):
        self.batch_sizes.append(len(x_t))
        out = x_t
        for label, n in self.n_classes.items():
            ids = conditions.get(label, torch.full((len(x_t),), n))
            out = out + ids[:, None, None] ** 2
        return out


X, T = torch.arange(8.0).view(2, 2, 2), torch.tensor([0.1, 0.2])
A, B = {"a": torch.tensor([0, 1])}, {"b": torch.tensor([2, 4])}


@pytest.mark.parametrize("strategy", ["joint", "mutually_exclusive"])
def test_guidance_of_one_is_conditional_and_of_zero_is_null_at_one_evaluation(strategy):
    model = Spy(strategy)
    assert torch.equal(guided_prediction(model, A, scale=1.0)(X, T), model(X, T, A))
    assert torch.equal(guided_prediction(model, A, scale=0.0)(X, T), model(X, T, {}))
    assert model.batch_sizes == [2, 2, 2, 2]


def test_other_guidance_is_one_batch_of_twice_the_cells():
    model = Spy("joint")
    both = {**A, **B}
    guided = guided_prediction(model, both, scale=2.5)(X, T)
    assert model.batch_sizes == [4]
    null, conditional = model(X, T, {}), model(X, T, both)
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null))


def test_exclusive_labels_are_guided_one_at_a_time_each_by_its_scale():
    model = Spy("mutually_exclusive")
    guided = guided_prediction(model, {**A, **B}, scale={"a": 1.5, "b": 3.0})(X, T)
    assert model.batch_sizes == [6]
    null, a, b = (model(X, T, conditions) for conditions in ({}, A, B))
    torch.testing.assert_close(guided, null + 1.5 * (a - null) + 3.0 * (b - null))


def written_out(model, together, a, b):
    null, both = model(X, T, {}), model(X, T, {**A, **B})
    return null + together * (both - null) + a * (model(X, T, A) - null) + b * (model(X, T, B) - null)


@pytest.mark.parametrize(
    ("scale", "outputs"),
    [
        ({"*": 1.0, "a": 0.5, "b": 3.0}, 4), ({"*": 1.0, "a": 0.5}, 3), ({"*": 0.0, "a": 1.0}, 1),
        ({"*": 0.0, "a": 0.5, "b": 0.5}, 2), ({"*": 1.0}, 1), ({"*": 0.0}, 1), ({"*": 2.0, "b": 0.0}, 2),
    ],
)  # fmt: skip
def test_joint_labels_may_each_have_a_scale_beside_that_of_all_together(scale, outputs):
    model = Spy("joint")
    guided = guided_prediction(model, {**A, **B}, scale=scale)(X, T)
    assert model.batch_sizes == [2 * outputs], "no output with weight 0 is computed"
    terms = (scale.get(k, 0.0) for k in ("*", "a", "b"))
    torch.testing.assert_close(guided, written_out(model, *terms))


def test_scales_of_each_cell_give_what_the_same_scales_give_for_all():
    scales = [{"*": 1.0, "a": 0.5, "b": 3.0}, {"*": 2.0, "a": 0.0, "b": -1.0}]
    per_cell = {k: torch.tensor([w[k] for w in scales]) for k in scales[0]}
    model = Spy("joint")
    mixed = per_cell_prediction(model, {**A, **B}, per_cell)(X, T)
    assert model.batch_sizes == [4 + 2], "the weights of the second cell add up to 1 without the null class"
    for cell, scale in enumerate(scales):
        torch.testing.assert_close(mixed[cell], guided_prediction(Spy("joint"), {**A, **B}, scale=scale)(X, T)[cell])


def test_the_only_label_of_a_cell_is_all_of_its_labels():
    null = Spy.n_classes
    model, without_b = Spy("joint"), {**A, "b": torch.full((2,), null["b"])}
    per_cell = {"*": torch.full((2,), 1.5), "a": torch.full((2,), 0.5), "b": torch.full((2,), 7.0)}
    guided = per_cell_prediction(model, without_b, per_cell)(X, T)
    assert model.batch_sizes == [4], "null and conditional"
    torch.testing.assert_close(guided, guided_prediction(Spy("joint"), A, scale=2.0)(X, T))
    torch.testing.assert_close(guided, guided_prediction(Spy("joint"), A, scale={"*": 1.5, "a": 0.5})(X, T))


def test_equal_scales_without_one_of_all_together_are_that_scale():
    both = {**A, **B}
    equal = guided_prediction(Spy("joint"), both, scale={"a": 2.0, "b": 2.0})(X, T)
    assert torch.equal(equal, guided_prediction(Spy("joint"), both, scale=2.0)(X, T))


def test_exclusive_labels_have_no_scale_of_all_together():
    with pytest.raises(ValueError, match="sets one label at a time"):
        guided_prediction(Spy("mutually_exclusive"), {**A, **B}, scale={"*": 1.0, "a": 1.0, "b": 1.0})


def test_without_conditions_there_is_nothing_to_guide():
    assert [term.labels for term in guidance_terms([], 3.0, strategy="joint")] == [()]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"a": 1.0, "b": 2.0}, "give one scale"),
        ({"a": 1.0}, r"no scale for the labels \['b'\]"),
        ({"c": 1.0}, "unknown"),
    ],
)
def test_invalid_scales_are_refused(scale, message):
    with pytest.raises(ValueError, match=message):
        guided_prediction(Spy("joint"), {**A, **B}, scale=scale)


def test_guiding_a_score_guides_its_velocity():
    path, model = PathConfig(path="gvp", prediction="score"), Spy("joint")
    null, conditional = (to_velocity(model(X, T, c), X, T, path) for c in ({}, A))
    guided = guided_velocity(model, A, scale=2.0, path=path)(X, T)
    torch.testing.assert_close(guided, null + 2 * (conditional - null))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_guided_halves_of_upstream_are_reproduced(name):
    """Upstream guides the second half of its batch and leaves the first unconditional."""
    fixture = load_fixture(name)
    dit, n = dit_of(fixture), len(fixture["in/x"]) // 2
    x, t = fixture["in/x"][n:], fixture["in/t"][n:]
    conditions = {label: ids[n:] for label, ids in fixture.under("in/cond/").items()}
    for w in ("0", "0.5", "1", "2", "5"):
        guided = guided_prediction(dit, conditions, scale=float(w))(x, t)
        torch.testing.assert_close(guided, fixture[f"out/cfg/w{w}"][n:], rtol=1e-5, atol=3e-5)
    null = guided_prediction(dit, conditions, scale=0.0)(fixture["in/x"][:n], fixture["in/t"][:n])
    close(null, fixture["out/cfg/none"][:n])
    if "mixed_scale" in fixture.facts:
        scale = fixture.facts["mixed_scale"]
        if dit.strategy == "joint":
            scale = sum(scale.values()) / len(scale)  # upstream averages them; ours asks for one scale
        guided = guided_prediction(dit, conditions, scale=scale)(x, t)
        torch.testing.assert_close(guided, fixture["out/cfg/mixed"][n:], rtol=1e-5, atol=3e-5)
