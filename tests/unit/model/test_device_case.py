"""The comparison of `tests/gpu` runs on the CPU with itself: it finds no difference, and sees one that is there."""

from __future__ import annotations

import pytest
import torch
from helpers.models import device_case
from helpers.models.device_case import (
    apart,
    distances,
    flow_quantities,
    generated,
    prefetched,
    samples,
    vae_quantities,
)


@pytest.mark.parametrize("compute", [vae_quantities, flow_quantities, generated, lambda d: samples(d, "adams")])
def test_a_device_equals_itself(compute):
    found = distances(compute, "cpu")
    assert found
    assert set(found.values()) == {0.0}


def test_another_gradient_is_seen_and_the_rounding_of_a_zero_is_not():
    here = vae_quantities("cpu", sampled=True)
    there = {k: v * (1.01 if k == "grad log_theta" else 1) for k, v in here.items()}
    there["grad decoder.head.bias"] = -here["grad decoder.head.bias"]  # softmax ignores this bias
    found = apart(there, here)
    assert found.pop("grad log_theta") == pytest.approx(0.01, rel=1e-3)
    assert found.pop("grad decoder.head.bias") < 1e-3
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("compute", [vae_quantities, flow_quantities])
def test_bf16_is_near_fp32_on_the_cpu_too(compute):
    found = apart(compute("cpu", precision="bf16"), compute("cpu"))
    assert 0 < max(v for k, v in found.items() if not k.startswith("grad")) < 0.02
    assert max(v for k, v in found.items() if k.startswith("grad")) < 0.15


def test_prefetched_batches_are_those_of_the_tables():
    found = prefetched("cpu", n_steps=3)
    assert len(found) == 6
    assert torch.equal(found[1]["counts"], found[2]["counts"])  # the same table, in the next step
    assert device_case.table(0).num_rows == 4
