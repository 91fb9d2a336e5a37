"""A job whose requests cannot be met says so, and does not wait without a word."""

import logging
import time

import pytest

from pipeline.cluster.needs import request_problems, speaks_while_waiting
from pipeline.config.job import ResourcesConfig


def resources(**given):
    return ResourcesConfig.model_validate(given)


@pytest.mark.parametrize(
    ("given", "stages", "have", "said"),
    [
        ({"gpus_per_worker": 1}, ["train_vae"], {"CPU": 8}, "asks for 2 GPUs (2 training workers"),
        ({"gpus_per_worker": 1, "workers": {"min": 1, "max": 4}}, ["train_flow"], {"CPU": 8, "GPU": 1}, None),
        ({"gpus_per_worker": 1}, ["generate"], {"CPU": 8}, "asks for 1 GPUs (1 actors"),
        ({"gpus_per_worker": 0.5}, ["train_vae"], {"CPU": 8, "GPU": 1}, None),
        ({"gpus_per_worker": 1}, ["ingest", "evaluate"], {"CPU": 8}, None),
        ({"gpus_per_worker": 1}, [], {"CPU": 8}, None),
        ({"cpus_per_worker": 8}, ["train_vae"], {"CPU": 8}, "asks for 16 CPUs"),
        ({}, ["train_vae", "encode"], {"CPU": 2}, None),
    ],
)
def test_requests_are_compared_with_what_the_cluster_has(given, stages, have, said):
    problems = request_problems(resources(**given), stages, have)
    assert (said in problems[0]) if said else problems == []


def test_a_joined_cluster_that_lacks_gpus_is_spoken_of_until_it_has_them(caplog):
    have = {"CPU": 4.0}
    asked = resources(gpus_per_worker=1)
    with (
        caplog.at_level(logging.WARNING),
        speaks_while_waiting(asked, ["train_vae"], lambda: have, first=0.02, every=0.02),
    ):
        deadline = time.monotonic() + 10
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "waiting: the job asks for 2 GPUs" in caplog.text
        have["GPU"] = 2.0
        time.sleep(0.2)
        n = len(caplog.records)
        time.sleep(0.2)
        assert len(caplog.records) == n


def test_nothing_is_said_of_a_cluster_that_has_what_is_asked_for(caplog):
    with speaks_while_waiting(resources(), ["train_vae"], lambda: {"CPU": 4.0}, first=0.01, every=0.01):
        time.sleep(0.1)
    assert not caplog.records
