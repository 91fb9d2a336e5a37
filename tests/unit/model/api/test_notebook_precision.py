"""A notebook's model computes in a precision, says in which, and refuses what its device lacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.stages.cell_stages import models, real_cells

import scldm
from scldm.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models(root)
    return root


@pytest.fixture(scope="module")
def single(folder):
    return scldm.load(folder)


@pytest.fixture(scope="module")
def half(folder):
    return scldm.load(folder, precision="bf16")


def near(found, expected) -> bool:
    found, expected = np.asarray(found).ravel(), np.asarray(expected).ravel()
    return not np.array_equal(found, expected) and np.corrcoef(found, expected)[0, 1] > 0.95


def test_a_model_says_its_precision(single, half):
    assert (single.precision, half.precision) == ("fp32", "bf16")
    assert repr(single).endswith("on cpu")
    assert repr(half).endswith("on cpu in bf16")


def test_every_method_is_near_fp32_and_says_what_it_was(single, half):
    calls = {
        "encode": lambda m: m.encode(real_cells()),
        "reconstruct": lambda m: m.reconstruct(real_cells()),
        "perturb": lambda m: m.perturb(real_cells(), {"cell_type": "NK"}, sampler={"solver": "euler", "steps": 4}),
        "generate": lambda m: m.generate({"cell_type": "B"}, n=40, seed=1),
    }
    for name, call in calls.items():
        for model, told in ((single, "fp32"), (half, "bf16")):
            about = call(model).uns["X_scldm" if name == "encode" else "scldm"]
            assert (about["precision"], about["device"]) == (told, "cpu"), name
        assert near(call(half).obsm["X_scldm"], call(single).obsm["X_scldm"]), name


def test_likelihoods_say_it_in_their_attrs(single, half):
    found, expected = (m.log_likelihood(real_cells()) for m in (half, single))
    assert found.attrs["scldm"] == {"precision": "bf16", "device": "cpu"}
    assert near(found["nll"], expected["nll"])


def test_cells_of_another_precision_have_other_names(single, half):
    first, second = (m.generate({"cell_type": "B"}, n=5, seed=1) for m in (single, half))
    assert not set(first.obs_names) & set(second.obs_names)


def test_an_adaptive_solver_gets_fp32_unless_it_was_set(folder, monkeypatch):
    model = scldm.load(folder)
    monkeypatch.setattr("scldm.nn.kernels.precision.available", lambda device: ("bf16", "tf32", "fp32"))
    told = {
        solver: model.generate({"cell_type": "B"}, n=5, sampler={"solver": solver, "steps": 4}).uns["scldm"][
            "precision"
        ]
        for solver in ("euler", "dopri5", "adams")
    }
    assert told == {"euler": "bf16", "dopri5": "fp32", "adams": "bf16"}


def test_a_precision_that_is_none_or_that_the_device_lacks_is_refused(folder):
    with pytest.raises(InputError, match="precision must be 'fp32' or 'tf32' or 'bf16'; got 'fp16'"):
        scldm.load(folder, precision="fp16")
    with pytest.raises(InputError, match=r"precision \(tf32\) exists on NVIDIA GPUs.*leave precision out"):
        scldm.load(folder, precision="tf32")
    assert not torch.backends.cuda.matmul.allow_tf32
