"""Checks of `scldm doctor` on this machine: versions, GPUs, NCCL, disk, storage.

A check is a function from requirements to a Finding. It changes nothing, except for a temporary file that it removes.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import uuid
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from pipeline.cli.doctor.finding import Finding, Requirements
from pipeline.core.files import REPOSITORY
from scldm.errors import InputError

LEAST_FREE = 5e9  # bytes: the demo's outputs and Ray's logs
# Packages whose version matters; the rest of constraints.txt follows from these.
COMPARED = (
    *("ray", "torch", "deepspeed", "mlflow", "tiledbsoma", "cellxgene-census", "anndata", "pyarrow", "numpy"),
    *("pydantic", "safetensors", "scanpy", "numcodecs"),
)


# ---- this machine ----------------------------------------------------------------------------------------------------
def versions(requirements: Requirements, constraints: Path = REPOSITORY / "constraints.txt") -> Finding:
    if not constraints.is_file():
        return Finding("versions", "skip", f"no {constraints}: installed without the repository")
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", constraints.read_text(), re.M))
    wrong = []
    for name in COMPARED:
        try:
            found = metadata.version(name).partition("+")[0]  # 2.13.0+cpu
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found != pinned[name]:
            wrong.append(f"{name} {found} (tested: {pinned[name]})")
    if wrong:
        return Finding(
            "versions", "fail", "; ".join(wrong), f"make venv, or pip install -c {constraints} '{REPOSITORY}[pipeline]'"
        )
    return Finding("versions", "ok", f"Python {sys.version.split()[0]}, {len(COMPARED)} packages as in constraints.txt")


def gpus(requirements: Requirements) -> Finding:
    import torch

    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        return Finding("gpus", "ok", f"{torch.cuda.device_count()} x {', '.join(names)}, CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        fix = (
            "a CUDA build of torch no newer than the driver: compare nvidia-smi with python -m torch.utils.collect_env"
        )
        return Finding("gpus", "fail", f"nvidia-smi is there, but torch {torch.__version__} sees no GPU", fix)
    if requirements.gpus and "RAY_ADDRESS" not in os.environ and requirements.address is None:
        fix = "run it where GPUs are (scldm submit), or set resources.gpus_per_worker=0"
        return Finding("gpus", "fail", "the job asks for GPUs and this machine has none", fix)
    where = "; the job's are the cluster's" if requirements.gpus else "; jobs run on CPUs"
    return Finding("gpus", "ok", f"none here{where}")


def nccl(requirements: Requirements) -> Finding:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return Finding("nccl", "skip", "no GPU here")
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        one = torch.ones(1, device="cuda")
        dist.all_reduce(one)
        torch.cuda.synchronize()
    finally:
        dist.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("nccl", "ok", f"NCCL {version} reduces on one GPU; between machines: NCCL_DEBUG=INFO in a short job")


def disk(requirements: Requirements) -> Finding:
    there = next(p for p in [requirements.output, *requirements.output.parents] if p.exists())
    free = shutil.disk_usage(there).free
    tmp = shutil.disk_usage("/tmp").free
    message = f"{free / 1e9:.0f} GB free at {there}, {tmp / 1e9:.0f} GB in /tmp (Ray's)"
    if min(free, tmp) < LEAST_FREE:
        return Finding(
            "disk", "fail", message, f"make room for at least {LEAST_FREE / 1e9:.0f} GB; scldm plan says how much"
        )
    return Finding("disk", "ok", message)


def storage(requirements: Requirements) -> Finding:
    """A file written, forced to disk, renamed, read, as stages do; and the second place for checkpoints."""
    fix = "output must be a folder that you may write, on every node the same: output=/shared/runs"
    here = requirements.output / f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        requirements.output.mkdir(parents=True, exist_ok=True)
        with here.open("wb") as f:
            f.write(b"x" * 4096)
            f.flush()
            os.fsync(f.fileno())
        renamed = here.rename(here.with_suffix(".renamed"))
        whole = renamed.read_bytes() == b"x" * 4096
        renamed.unlink()
    except OSError as error:
        with suppress(OSError):
            here.unlink()
        return Finding("storage", "fail", f"{requirements.output}: {error.strerror or error}", fix)
    if not whole:
        return Finding("storage", "fail", f"{requirements.output} gives back other bytes than were written", fix)
    if requirements.storage is None:
        return Finding("storage", "ok", f"{requirements.output} takes files, fsync and rename")
    from pipeline.training.checkpoints.remote import check_storage

    try:
        check_storage(requirements.storage, "doctor")
    except InputError as error:
        return Finding("storage", "fail", str(error).splitlines()[0], "checkpoints.storage_path and its credentials")
    return Finding("storage", "ok", f"{requirements.output} and {requirements.storage.storage_path} take files")
