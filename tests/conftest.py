"""One local Ray cluster for a test session."""

import os

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    yield
    ray.shutdown()
