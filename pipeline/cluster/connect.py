"""Ray for a job that runs here: join the cluster that RAY_ADDRESS names or start a small one; unwrap what it raises.

Ray is imported only when something runs. Jobs are sent to a cluster by `pipeline.cluster.submit`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.job import ResourcesConfig
from scldm.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the driver of a submitted job
MAX_STORE = 1_000_000_000
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_raylet_start_wait_time_s": "180",  # a loaded laptop may need longer than the default 60 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
}


@contextmanager
def connect(resources: ResourcesConfig) -> Iterator[None]:
    """Ray for the time of a job. A cluster started here is stopped at the end; one that was joined is left alone."""
    address = os.environ.get("RAY_ADDRESS") or None
    if address and address.startswith("http"):
        raise InputError(
            f"RAY_ADDRESS={address} is the address for submitting: use `scldm submit`, or set RAY_ADDRESS to host:port"
        )
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    if address is None:
        # A local ray.init would otherwise write a token to ~/.ray and turn authentication on for later clusters.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # The back end's own log still goes to its files; on the terminal it explains nothing to the user.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Reads hold no CPU slot, so Ray starts more workers than the machine has cores, and warns of it below this.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress is shown by ours
    if ray.is_initialized():  # by a test, or by whoever called us: theirs to configure and to stop
        yield
        return
    options = {"address": address} if address else _local_options(resources)
    try:
        ray.init(
            **options,
            runtime_env=runtime_env(resources),
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=True,
        )
    except ConnectionError as error:
        raise InputError(
            f"RAY_ADDRESS={address}: no cluster answers ({error}); unset it to start a local one"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _local_options(resources: ResourcesConfig) -> dict[str, Any]:
    """Logical CPUs for the workers, and two more for data and the driver's actors, on however small a machine."""
    training = math.ceil(resources.workers.max * resources.cpus_per_worker)
    cpus = max(os.cpu_count() or 1, training + 2, resources.actors_max + 1)
    return {
        "address": "local",
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": max(min(MAX_STORE, int(0.2 * _memory())), 80_000_000),
    }


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def runtime_env(resources: ResourcesConfig) -> dict[str, Any]:
    """What workers need to find our code and stay quiet. What the job's submitter has set already is left out."""
    submitted = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("runtime_env") or {}
    env = dict(QUIET)
    if len(resources.world_sizes) > 1:  # the first try after a node died asks for its worker again, and waits this long
        env["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
    if resources.gpus_per_worker == 0:
        env["DS_ACCELERATOR"] = "cpu"
    if not submitted.get("working_dir"):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    taken = submitted.get("env_vars") or {}  # Ray refuses to merge a key that both set
    return {"env_vars": {k: v for k, v in env.items() if k not in taken}}


# ---- errors ------------------------------------------------------------------------------------------------------
def root_cause(error: BaseException) -> BaseException:
    """The exception that a user can act on, out of Ray's wrappings (by duck typing: works without importing ray)."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        inner = (
            next(iter(failures.values()), None)
            if isinstance(failures, dict)
            else getattr(error, "controller_failure", None) or getattr(error, "_base_exc", None)
        )
        inner = inner or getattr(error, "cause", None) or _wrapped(error)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def _wrapped(error: BaseException) -> BaseException | None:
    """`raise … from cause`, but only for Ray's own types: our errors explain more than their causes."""
    return error.__cause__ if type(error).__module__.partition(".")[0] == "ray" else None
