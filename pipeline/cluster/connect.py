"""Connect a job to Ray: join the cluster that RAY_ADDRESS names or start a local one; unwrap Ray's exceptions.

Ray is imported only when something runs. Jobs are sent to a cluster by `pipeline.cluster.submit`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.cluster.loopback import bypass_proxies
from pipeline.cluster.needs import request_problems, speaks_while_waiting
from pipeline.cluster.temp_folder import short_temp_folder
from pipeline.config.job import ResourcesConfig
from pipeline.core.files import REPOSITORY
from scldm.errors import InputError

log = logging.getLogger(__name__)
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
def connect(resources: ResourcesConfig, stages: Collection[str] = ()) -> Iterator[None]:
    """Connect to Ray for the duration of a job; a cluster that is started here is stopped at the end.

    Args:
        stages: Names of the stages that will run, whose requests are compared with what the cluster has.

    Raises:
        InputError: no cluster answers, none can be started here, or one that is started here cannot meet the requests;
            or RAY_ADDRESS is set for a job without Ray.
    """
    bypass_proxies()
    address = os.environ.get("RAY_ADDRESS") or None
    if not resources.ray:
        if address:
            raise InputError(
                f"resources.ray=false runs on this machine alone, and RAY_ADDRESS={address} names a cluster; unset one "
                "of them"
            )
        yield
        return
    if address and address.startswith("http"):
        raise InputError(
            f"RAY_ADDRESS={address} is the address for submitting: use `scldm submit`, or set RAY_ADDRESS to host:port"
        )
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    if address is None:
        # A local ray.init would otherwise write a token to ~/.ray and turn authentication on for later clusters.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # The log of Ray's C++ processes still goes to files; on the terminal it tells the user nothing.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Reads hold no CPU slot, so Ray starts more workers than the machine has cores; below this number it warns.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress.json shows the same
    if ray.is_initialized():  # by the caller, who configures and stops it
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
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise InputError(_no_cluster(address, error)) from error
    try:
        if address is None and (problems := request_problems(resources, stages, ray.cluster_resources())):
            remedy = "; run it where they are (scldm submit), or ask for less"
            less = ", for example resources.gpus_per_worker=0" if resources.gpus_per_worker else ""
            raise InputError("\n".join(f"{problem} on this machine{remedy}{less}" for problem in problems))
        with speaks_while_waiting(resources, stages, ray.cluster_resources):
            yield
    finally:
        ray.shutdown()


def _no_cluster(address: str | None, error: Exception) -> str:
    """Say why Ray did not start or answer, and what to do."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if address is not None:
        return f"RAY_ADDRESS={address}: no cluster answers ({first}); unset it to start a local one"
    return f"Ray cannot start on this machine ({first}); `scldm doctor` checks the machine"


def _local_options(resources: ResourcesConfig) -> dict[str, Any]:
    """Return options of ray.init: CPUs for the workers and two more for data and actors, on a machine of any size."""
    training = math.ceil(resources.workers.max * resources.cpus_per_worker)
    cpus = max(os.cpu_count() or 1, training + 2, resources.actors_max + 1)
    folder = short_temp_folder()
    if folder is not None:
        log.info("Ray keeps its session in %s: the path of TMPDIR is too long for its sockets", folder)
    return {
        "address": "local",
        **({} if folder is None else {"_temp_dir": folder}),
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": max(min(MAX_STORE, int(0.2 * _memory())), 80_000_000),
    }


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def runtime_env(resources: ResourcesConfig) -> dict[str, Any]:
    """Return the runtime environment in which workers find this code, without what the job's submitter has set."""
    submitted = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("runtime_env") or {}
    env = dict(QUIET)
    if len(resources.world_sizes) > 1:  # after a node died, the first try waits this long for its replacement
        env["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
    if resources.gpus_per_worker == 0:
        env["DS_ACCELERATOR"] = "cpu"
    if not submitted.get("working_dir"):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    taken = submitted.get("env_vars") or {}  # Ray refuses to merge a key that both set
    return {"env_vars": {k: v for k, v in env.items() if k not in taken}}


# ---- errors ------------------------------------------------------------------------------------------------------
def root_cause(error: BaseException) -> BaseException:
    """Return the exception that a user can act on from Ray's wrappers (by duck typing: ray is not imported)."""
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
    """Return the `raise … from cause` of Ray's own types only: our errors explain more than their causes."""
    return error.__cause__ if type(error).__module__.partition(".")[0] == "ray" else None
