"""The DiT computes what upstream's does, starts at zero, and drops labels as documented."""

import pytest
import torch
from helpers.models.recorded_dit import CASES, dit_of
from helpers.models.upstream_fixtures import load_fixture

from scldm.checkpoints.upstream.names_dit import dit_key
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT, drop_labels, sincos_positions, time_frequencies, validate_ids


def small_dit(**choices) -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(d_model=16, n_layers=2, n_heads=2, **choices)
    return DiT(config, n_latent_tokens=3, latent_width=4, n_classes={"cell_type": 5, "tissue": 2})


def close(ours: torch.Tensor, recorded: torch.Tensor) -> None:
    torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_recorded_outputs_of_upstream_are_reproduced(name):
    fixture = load_fixture(name)
    dit, x, t, conditions = dit_of(fixture), fixture["in/x"], fixture["in/t"], fixture.under("in/cond/")
    close(time_frequencies(t), fixture["out/t_freq"])
    close(dit.time(t), fixture["out/t_embed"])
    close(dit(x, t, {}), fixture["out/forward_null"])
    if "out/forward" in fixture.tensors:
        close(dit(x, t, conditions), fixture["out/forward"])
    for label, expected in fixture.under("out/forward_only_").items():
        close(dit(x, t, {label: conditions[label]}), expected)


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_gradients_of_upstream_are_reproduced(name):
    fixture = load_fixture(name)
    dit, dropped, facts = dit_of(fixture), fixture["out/train_drop_mask"], fixture.facts
    chosen = facts["train"].get("selected")  # the one label that upstream drew; None where all are used
    conditions = {
        label: torch.where(dropped, dit.n_classes[label], ids)
        for label, ids in fixture.under("in/cond/").items()
        if chosen in (None, label)
    }
    out = dit(fixture["in/x"], fixture["in/t"], conditions)
    close(out, fixture["out/train_seed123"])
    out.square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in dit.named_parameters()}
    for key, expected in fixture.under("grad/").items():
        torch.testing.assert_close(gradients[dit_key(key)], expected, rtol=1e-4, atol=1e-6)
    norms = torch.stack([gradients[dit_key(key)].norm() for key in facts["grad_norm_names"]])
    torch.testing.assert_close(norms, fixture["grad_norms"], rtol=1e-4, atol=1e-6)


def test_positions_and_initial_zeros_are_those_of_upstream():
    fixture = load_fixture("dit_me_single")
    torch.testing.assert_close(sincos_positions(16, 256)[0], fixture["ref/sincos_16x256"], rtol=0, atol=1e-6)
    recorded = fixture.facts["config"]
    config = DiTConfig(d_model=recorded["n_embed"], n_layers=2, n_heads=4, strategy="mutually_exclusive")
    dit = DiT(config, n_latent_tokens=8, latent_width=16, n_classes=recorded["class_vocab_sizes"])
    zero = {name for name, parameter in dit.named_parameters() if not parameter.any()}
    assert zero == {dit_key(name) for name in fixture.facts["init"]["zeros"]}
    for name, std in fixture.facts["init"]["std"].items():
        assert dit.state_dict()[dit_key(name)].std().item() == pytest.approx(std, rel=0.15, abs=1e-9), name


def test_a_new_dit_predicts_zero():
    dit = small_dit()
    assert not dit(torch.randn(2, 3, 4), torch.rand(2), {}).any()


def test_positions_are_saved_and_not_trained():
    dit = small_dit()
    assert "positions" in dit.state_dict()
    assert "positions" not in dict(dit.named_parameters())


def test_an_absent_label_is_the_null_class():
    dit = small_dit()
    torch.nn.init.normal_(dit.head.linear.weight)
    torch.nn.init.normal_(dit.head.adaln.weight)
    x, t, ids = torch.randn(2, 3, 4), torch.rand(2), torch.tensor([4, 0])
    absent = dit(x, t, {"cell_type": ids})
    torch.testing.assert_close(absent, dit(x, t, {"cell_type": ids, "tissue": torch.tensor([2, 2])}))
    assert not torch.allclose(absent, dit(x, t, {"cell_type": ids, "tissue": torch.tensor([0, 0])}))


def test_a_label_may_be_named_like_a_module_method_or_contain_a_dot():
    config = DiTConfig(d_model=8, n_layers=1, n_heads=2)
    dit = DiT(config, n_latent_tokens=2, latent_width=2, n_classes={"type": 2, "cell.type": 3})
    assert sorted(len(table) for table in dit.labels.parameters()) == [3, 4], "a row for each class, and for none"
    x, t = torch.zeros(1, 2, 2), torch.zeros(1)
    conditions = {"type": torch.tensor([1]), "cell.type": torch.tensor([2])}
    for name, p in dit.named_parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    out = dit(x, t, conditions)
    assert out.shape == x.shape
    for name in conditions:
        assert not torch.equal(dit(x, t, conditions | {name: torch.tensor([0])}), out), f"{name} decides nothing"


def test_an_unknown_label_is_an_error():
    with pytest.raises(ValueError, match=r"unknown labels \['organ'\]"):
        small_dit()(torch.zeros(1, 3, 4), torch.zeros(1), {"organ": torch.tensor([0])})


def test_an_id_out_of_range_is_named():
    n_classes = {"tissue": 2}
    validate_ids({"tissue": torch.tensor([0, 1, 2])}, n_classes, strategy="joint")
    with pytest.raises(ValueError, match=r"'tissue'\] holds id 3; allowed are 0\.\.1, and 2 for null"):
        validate_ids({"tissue": torch.tensor([0, 3])}, n_classes, strategy="joint")


def test_two_exclusive_labels_of_one_cell_are_an_error():
    n_classes = {"a": 2, "b": 2}
    one_each = {"a": torch.tensor([0, 2]), "b": torch.tensor([2, 1])}
    validate_ids(one_each, n_classes, strategy="mutually_exclusive")
    with pytest.raises(ValueError, match="cell 1 set 2 labels"):
        validate_ids({"a": torch.tensor([0, 1]), "b": torch.tensor([2, 1])}, n_classes, strategy="mutually_exclusive")


N_CELLS = 40_000
TWO_LABELS = {"a": torch.zeros(N_CELLS, dtype=torch.long), "b": torch.ones(N_CELLS, dtype=torch.long)}
TWO_VOCABULARIES = {"a": 3, "b": 4}


def kept_fractions(**choices) -> dict[str, float]:
    """Fractions of cells that keep both labels, only a, only b, none."""
    generator = torch.Generator().manual_seed(0)
    out = drop_labels(TWO_LABELS, TWO_VOCABULARIES, generator=generator, **choices)
    a, b = out["a"] != 3, out["b"] != 4
    assert bool((out["a"][a] == 0).all())
    assert bool((out["b"][b] == 1).all())
    counts = {"both": a & b, "a": a & ~b, "b": ~a & b, "none": ~a & ~b}
    return {name: cells.float().mean().item() for name, cells in counts.items()}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"strategy": "joint"}, {"both": 0.512, "a": 0.128, "b": 0.128, "none": 0.232}),
        ({"strategy": "joint", "joint_dropout": "all"}, {"both": 0.8, "a": 0.0, "b": 0.0, "none": 0.2}),
        ({"strategy": "joint", "joint_dropout": "each"}, {"both": 0.64, "a": 0.16, "b": 0.16, "none": 0.04}),
        ({"strategy": "mutually_exclusive"}, {"both": 0.0, "a": 0.4, "b": 0.4, "none": 0.2}),
    ],
)
def test_labels_are_dropped_as_often_as_documented(choices, expected):
    assert kept_fractions(p=0.2, **choices) == pytest.approx(expected, abs=0.01)


def test_an_exclusive_label_is_drawn_among_those_that_a_cell_has():
    conditions = {"a": torch.full((50,), 3), "b": torch.ones(50, dtype=torch.long)}  # a is null already
    generator = torch.Generator().manual_seed(0)
    out = drop_labels(conditions, TWO_VOCABULARIES, p=0.0, generator=generator, strategy="mutually_exclusive")
    assert bool((out["b"] == 1).all())
    assert bool((out["a"] == 3).all())


def test_label_dropout_depends_on_its_generator_alone():
    def draw(labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return drop_labels(labels, TWO_VOCABULARIES, p=0.5, generator=generator, strategy="joint")

    first, second = draw(TWO_LABELS), draw(dict(reversed(TWO_LABELS.items())))
    assert all(torch.equal(first[label], second[label]) for label in first)


def test_given_draws_decide_as_documented():
    conditions = {"b": torch.tensor([1, 1, 1]), "a": torch.tensor([0, 0, 0])}
    draws = torch.tensor([[0.1, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.1]])  # all go, a goes, b goes
    out = drop_labels(conditions, TWO_VOCABULARIES, p=0.5, uniform=draws, strategy="joint")
    assert out["a"].tolist() == [3, 3, 0]
    assert out["b"].tolist() == [4, 1, 4]


def test_draws_must_come_from_one_place():
    with pytest.raises(ValueError, match="either a generator or uniform"):
        drop_labels(TWO_LABELS, TWO_VOCABULARIES, p=0.5, strategy="joint")
