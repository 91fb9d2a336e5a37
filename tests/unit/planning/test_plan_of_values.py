"""A plan counts the parameters of labels whose classes are values, and says what they are."""

from __future__ import annotations

import torch
from helpers.models.label_values import number, sets, vectors
from helpers.models.small_models import CELL_TYPES, vocabulary

from pipeline.config.job import IngestConfig, TrainFlowConfig, TrainVaeConfig
from pipeline.data.ingest.label_values import values_facts
from pipeline.planning.plan import _value_lines
from pipeline.planning.sizes import DataFacts, dit_parameters
from scldm.checkpoints.native import new_dit

LABELS = (CELL_TYPES, number(unit="uM", zero=["1"]), sets(), vectors(zero=["ctrl"]))


def test_the_parameters_are_those_of_the_network():
    names = vocabulary(*LABELS)
    data = DataFacts(n_classes=names.n_classes, values=values_facts(names.values)["label_values"])
    flow = TrainFlowConfig.model_validate({"model": {"d_model": 24, "n_layers": 1, "n_heads": 2}})
    vae = TrainVaeConfig.model_validate({"model": {"n_latent_tokens": 3, "latent_width": 4}})
    torch.manual_seed(0)
    built = new_dit(flow.model, names, latent_shape=(3, 4))
    assert dit_parameters(flow, vae, data) == sum(p.numel() for p in built.parameters())


def test_kinds_are_said_before_ingest_and_what_was_measured_after_it():
    given = {
        "source": {"type": "synthetic"}, "labels": ["dose", "drugs"],
        "label_values": {"dose": {"type": "number", "unit": "uM", "scale": "log"}, "drugs": {"type": "set"}},
    }  # fmt: skip
    config = IngestConfig.model_validate(given)
    assert _value_lines(DataFacts(), config) == ["label dose: number (unit uM, scale log)", "label drugs: set"]
    facts = values_facts(vocabulary(*LABELS).values)["label_values"]
    assert _value_lines(DataFacts(values=facts), config)[0] == (
        "label dose: a number in uM, linear scale, 3 to 10 (2 values); untreated: 1"
    )
