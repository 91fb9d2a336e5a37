"""Every file in cluster/: Ray takes its form, versions are those of constraints.txt, nothing is open to strangers."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.io.loader import load_job
from pipeline.training.callbacks.stop_signal import CHECK_FILE_EVERY

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
RAY_UP = sorted(
    p for p in CLUSTER.glob("*.yaml") if "available_node_types" in p.read_text() or "worker_ips" in p.read_text()
)
TEXT = sorted(p for p in CLUSTER.rglob("*") if p.is_file())
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def checked(raw: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` checks it, before it talks to a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(raw))
    validate_config(config)
    return config


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_there_is_a_file_for_every_place():
    there = {str(p.relative_to(CLUSTER)) for p in TEXT}
    kuberay = {f"kuberay/{s}.yaml" for s in ("base", "cluster", "ingest", "train_vae", "encode", "train_flow")}
    assert there >= {"aws.yaml", "gcp.yaml", "onprem.yaml", "slurm.sbatch", "skypilot.yaml", "Dockerfile", *kuberay}


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_ray_takes_the_file(path):
    checked(load(path))


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_ray_would_not_take_it_with_a_misspelt_key(path):
    """The check above is one that can fail."""
    with pytest.raises(Exception, match="idle_timeout_minute"):
        checked({**load(path), "idle_timeout_minute": 5})


@pytest.mark.parametrize("path", [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"], ids=name)
def test_gpus_and_cpus_grow_from_zero_and_the_head_takes_no_work(path):
    config = load(path)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {k: t for k, t in types.items() if k != config["head_node_type"]}
    assert {t["min_workers"] for t in workers.values()} == {0}
    assert {"cpu", "a100_spot", "a100", "a100_80gb"} == set(workers)
    assert all(t["resources"]["GPU"] == 8 for k, t in workers.items() if k.startswith("a100"))
    assert 1 <= config["idle_timeout_minutes"] <= 30


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_ray_starts_from_the_root_of_the_repository_with_the_clusters_environment(path):
    """So that the literal `ray job submit jobs/train_vae.yaml` finds the file, on the head and in every worker."""
    config = load(path)
    place = next(remote for remote, local in config["file_mounts"].items() if local == ".")
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    for command in starts:
        assert command.startswith(f"cd {place} && . cluster/env.sh &&"), command
    assert "--num-cpus=0" in starts[0]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(local == "~/.ray/auth_token" for local in config["file_mounts"].values())
    assert {".env", ".git", "/runs", "/data"} <= set(config["rsync_exclude"])


def test_the_environment_has_a_token_and_time_for_a_checkpoint():
    command = f"set -eu; . {CLUSTER}/env.sh; env"
    out = subprocess.run(
        ["bash", "-c", command], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    env = dict(line.split("=", 1) for line in out.stdout.splitlines() if "=" in line)
    assert env["RAY_AUTH_MODE"] == "token"
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300 > CHECK_FILE_EVERY
    assert env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert not any("SECRET" in k or k == "RAY_AUTH_TOKEN" for k in env)


@pytest.mark.parametrize("path", [p for p in TEXT if p.suffix in (".sh", ".sbatch")], ids=name)
def test_a_script_is_one_that_bash_reads(path):
    subprocess.run(["bash", "-n", path], check=True)


# ---- nothing open, nothing secret, nothing unpinned -----------------------------------------------------------------
def lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        yield number, re.sub(r"(^|\s)#\s.*", "", line)


@pytest.mark.parametrize("path", TEXT, ids=name)
@pytest.mark.row("S1")
def test_nothing_listens_everywhere_without_a_token_or_a_network_policy(path):
    text = path.read_text()
    for number, line in lines(path):
        if "0.0.0.0" not in line:
            continue
        guarded = "authOptions: {mode: token}" in text or ("kind: NetworkPolicy" in text and "--allowed-hosts" in text)
        assert guarded, f"{name(path)}:{number}: {line.strip()}"


@pytest.mark.parametrize("path", [p for p in TEXT if "mlflow" in p.read_text() and "server" in p.read_text()], ids=name)
@pytest.mark.row("S1")
def test_an_mlflow_server_has_allowed_hosts_and_runs_nothing(path):
    text = "\n".join(line for _, line in lines(path))
    if re.search(r"mlflow,? server", text):
        assert "--allowed-hosts" in text
        source = text + (CLUSTER / "env.sh").read_text() * (". cluster/env.sh" in text)
        assert re.search(r"MLFLOW_SERVER_ENABLE_JOB_EXECUTION(=|, value: )\"?false", source)


@pytest.mark.parametrize("path", TEXT, ids=name)
def test_no_secret_and_no_floating_version_stands_in_a_file(path):
    text = "\n".join(line for _, line in lines(path))
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|(?i:secret_access_key|password)\s*[:=]\s*\S", text)
    assert not re.search(r"(image|FROM):?\s+\S+:latest", text)
    for ray in re.findall(r"rayproject/ray:(\d[\d.]*)|rayVersion: \"([\d.]+)\"|RAY_VERSION=([\d.]+)", text):
        assert "".join(ray) == PINNED["ray"], name(path)
    for python in re.findall(r"\bpy(3\d+)\b|python(3\.\d+)", text):
        assert "".join(python).replace(".", "") == "311", name(path)


def test_the_image_is_not_roots_and_does_not_take_in_data_or_secrets():
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^USER (\w+)", dockerfile, re.M)[-1] == "ray"
    assert "--constraint constraints.txt" in dockerfile
    assert {".env", ".git", "/data", "/runs", "**/*.h5ad"} <= set(
        (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    )


# ---- jobs fit the clusters that they name ----------------------------------------------------------------------------
@pytest.mark.parametrize("path", [p for p in JOBS if "\ncluster:" in p.read_text()], ids=name)
def test_a_jobs_workers_fit_the_cluster_that_it_names(path):
    job = load_job(path)
    config = load(ROOT / job.cluster)
    room = 0
    want = {"CPU": job.resources.cpus_per_worker, "GPU": job.resources.gpus_per_worker}
    for kind, node in config["available_node_types"].items():
        if kind == config["head_node_type"]:
            continue
        each = min(int(node["resources"].get(r, 0) // n) for r, n in want.items() if n)
        room += each * node["max_workers"]
    assert room >= max(job.resources.workers.max, job.resources.actors_max), f"{job.cluster} has room for {room}"


@pytest.mark.parametrize("family", ["census", "dentate_gyrus", "tabula_muris", "hlca", "parse1m", "replogle"])
def test_a_family_has_every_stage_under_one_name_and_a_cluster(family):
    from pipeline.config.job import STAGES

    jobs = {s: load_job(ROOT / "jobs" / family / f"{s}.yaml") for s in STAGES}
    assert {j.kind for j in jobs.values()} == set(STAGES)
    assert len({(j.name, j.output, j.cluster) for j in jobs.values()}) == 1
    assert all(jobs[s].resources.gpus_per_worker == 1 for s in ("train_vae", "encode", "train_flow", "generate"))


@pytest.mark.parametrize(("family", "preset"), [("dentate_gyrus", "dentate_gyrus"), ("census", "census_70m")])
def test_a_family_has_the_sizes_of_its_preset(family, preset):
    from scldm.api.presets import preset as named

    found = named(preset)
    vae = load_job(ROOT / "jobs" / family / "train_vae.yaml").model
    sizes = ("d_model", "n_layers", "n_heads", "n_latent_tokens", "latent_width")
    assert [getattr(vae, s) for s in sizes] == [getattr(found.vae.model, s) for s in sizes]
    if found.flow is not None:
        assert load_job(ROOT / "jobs" / family / "train_vae.yaml").model == found.vae.model
        assert load_job(ROOT / "jobs" / family / "train_flow.yaml").model == found.flow.model
