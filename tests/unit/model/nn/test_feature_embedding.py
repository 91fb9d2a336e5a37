"""Embeddings of classes by their features: beside tables as they were, smooth, pooled, and extended at will."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.models.label_values import number, sets, vectors
from helpers.models.small_models import CELL_TYPES, random_weights, vocabulary

from scldm.checkpoints.native import class_features, new_dit
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT, drop_labels

CONFIG = DiTConfig(d_model=16, n_layers=2, n_heads=2)
SHAPE = (3, 4)


def dit_of(*labels, seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    return random_weights(new_dit(CONFIG, vocabulary(*labels), latent_shape=SHAPE), seed)


def inputs(n: int, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=g), torch.rand(n, generator=g)


def test_labels_that_are_classes_have_the_parameters_and_the_first_numbers_that_they_had():
    torch.manual_seed(0)
    before = DiT(CONFIG, n_latent_tokens=3, latent_width=4, n_classes={"cell_type": 3})
    torch.manual_seed(0)
    now = new_dit(CONFIG, vocabulary(CELL_TYPES), latent_shape=SHAPE)
    assert list(now.state_dict()) == list(before.state_dict())
    assert all(torch.equal(x, before.state_dict()[k]) for k, x in now.state_dict().items())


@pytest.mark.parametrize("label", [number(), sets(), vectors(zero=["ctrl"])], ids=lambda x: x.name)
def test_embeddings_are_at_first_as_large_as_the_rows_of_a_table(label):
    torch.manual_seed(0)
    dit = new_dit(DiTConfig(d_model=256, n_layers=1, n_heads=2), vocabulary(label), latent_shape=SHAPE)
    embedded = dit.labels[f"label_{label.name}"](torch.arange(len(label.classes) + 1)).detach()
    assert 0.01 < float(embedded.std()) < 0.05
    assert float(embedded[-1].std()) == pytest.approx(0.02, rel=0.2)


def test_features_are_no_weights_and_keep_their_precision():
    dit = dit_of(CELL_TYPES, number())
    assert not [k for k in dit.state_dict() if "features" in k]
    before = dit.labels["label_dose"].features.clone()
    dit.to(torch.bfloat16)
    assert dit.labels["label_dose"].features.dtype == torch.float32
    assert torch.equal(dit.labels["label_dose"].features, before)
    assert dit(*inputs(2), {"dose": torch.tensor([0, 3])}).dtype == torch.bfloat16


def test_an_absent_label_is_the_null_class_and_dropping_a_label_reaches_its_vector():
    dit = dit_of(CELL_TYPES, number())
    x, t = inputs(5)
    ids = {"cell_type": torch.tensor([0, 1, 2, 3, 0]), "dose": torch.tensor([0, 1, 2, 3, 3])}
    null = {"dose": torch.full((5,), 3)}
    torch.testing.assert_close(dit(x, t, {}), dit(x, t, null))
    dropped = drop_labels(ids, dit.n_classes, p=1.0, strategy="joint", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dit(x, t, dropped), dit(x, t, {}))
    dit(x, t, ids).square().mean().backward()
    table = dit.labels["label_dose"]
    assert all(p.grad.abs().sum() > 0 for p in table.parameters())


def test_more_classes_change_no_output_of_those_that_there_are():
    labels = (CELL_TYPES, number(), sets(), vectors(zero=["ctrl"]))
    dit, names = dit_of(*labels), vocabulary(*labels)
    more = names.extended([{"dose": "2.5", "drugs": "A+C", "gene": "D"}, {"dose": "30"}])
    wide = dit.with_classes(class_features(more))
    x, t = inputs(4)
    old = {x.name: torch.tensor([0, 1, 2, x.null_id]) for x in names.labels}
    new = {x.name: torch.tensor([0, 1, 2, x.null_id]) for x in more.labels}
    torch.testing.assert_close(dit(x, t, old), wide(x, t, new), rtol=0, atol=0)
    torch.testing.assert_close(dit.at_one_time(old)(x, t[:1]), wide.at_one_time(new)(x, t[:1]), rtol=0, atol=0)
    assert wide.n_classes == {"cell_type": 3, "dose": 5, "drugs": 5, "gene": 5}
    assert dit.n_classes == {"cell_type": 3, "dose": 3, "drugs": 4, "gene": 4}
    shared = {id(p) for p in dit.parameters()}
    assert {id(p) for p in wide.parameters()} == shared


def test_a_table_of_classes_is_not_extended():
    with pytest.raises(ValueError, match="its classes are no values"):
        dit_of(CELL_TYPES).with_classes({"cell_type": class_features(vocabulary(number("cell_type")))["cell_type"]})


def test_the_order_of_a_sets_members_changes_nothing_and_their_embeddings_add_up():
    label = sets()
    dit = dit_of(label)
    table = copy.deepcopy(dit.labels["label_drugs"])
    ids = label.encode(["A+B", "B+A", " B + A", "A", "B"])
    assert ids[0] == ids[1] == ids[2]
    ab, _, _, a, b = table(torch.from_numpy(ids))
    torch.testing.assert_close(ab, a + b)


def test_a_number_between_two_others_is_embedded_between_them():
    """A value that is asked for is one more point of the same smooth function."""
    label = number(classes=("0", "1", "2", "3"))
    names = vocabulary(label).extended([{"dose": str(v)} for v in np.linspace(0, 3, 61).round(3)])
    torch.manual_seed(0)
    dit = new_dit(CONFIG, vocabulary(label), latent_shape=SHAPE).with_classes(class_features(names))
    own = names.label("dose")
    order = torch.from_numpy(own.encode([f"{v:g}" for v in np.linspace(0, 3, 61).round(3)]))
    curve = dit.labels["label_dose"](order).detach()
    steps = (curve[1:] - curve[:-1]).norm(dim=1)
    assert float(steps.max()) < 0.1 * float((curve.max(0).values - curve.min(0).values).norm())
