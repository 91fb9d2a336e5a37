"""Options that Ray gets, and what a user sees of its exceptions. No Ray is started here."""

from __future__ import annotations

import json

import pytest

from pipeline.cluster import connect as cluster
from pipeline.config.job import ResourcesConfig
from scldm.errors import InputError


def test_workers_find_our_code_and_know_that_they_have_no_gpu(monkeypatch):
    monkeypatch.delenv(cluster.JOB_CONFIG, raising=False)
    env = cluster.runtime_env(ResourcesConfig())["env_vars"]
    assert env["PYTHONPATH"].startswith(str(cluster.REPOSITORY))
    assert env["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in cluster.runtime_env(ResourcesConfig(gpus_per_worker=1))["env_vars"]


def test_what_the_submitter_set_is_left_to_the_submitter(monkeypatch):
    submitted = {"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"DS_ACCELERATOR": "cuda"}}}
    monkeypatch.setenv(cluster.JOB_CONFIG, json.dumps(submitted))
    env = cluster.runtime_env(ResourcesConfig())["env_vars"]
    assert "PYTHONPATH" not in env
    assert "DS_ACCELERATOR" not in env


def test_a_small_machine_has_logical_cpus_for_all_workers():
    options = cluster._local_options(ResourcesConfig(workers=6))
    assert options["num_cpus"] >= 8
    assert options["object_store_memory"] <= cluster.MAX_STORE


def test_an_http_address_is_for_submitting(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(InputError, match="scldm submit"), cluster.connect(ResourcesConfig()):
        pass


def test_the_cause_is_dug_out_of_rays_wrappings():
    import ray.exceptions
    from ray.train import ControllerError, WorkerGroupError

    cause = InputError("not counts")
    task = ray.exceptions.RayTaskError("f", "traceback", cause)
    user = ray.exceptions.UserCodeException()
    user.__cause__ = cause
    assert cluster.root_cause(task) is cause
    assert cluster.root_cause(task.as_instanceof_cause()) is cause
    assert cluster.root_cause(WorkerGroupError("failed", {1: task})) is cause
    assert cluster.root_cause(ControllerError(user)) is cause
    assert cluster.root_cause(cause) is cause


def test_our_errors_are_not_replaced_by_their_causes():
    error = InputError("what, where, why, how to mend")
    error.__cause__ = KeyError("x")
    assert cluster.root_cause(error) is error
