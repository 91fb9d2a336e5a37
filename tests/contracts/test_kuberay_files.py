"""cluster/kuberay: fields that KubeRay has, one cluster in all files, limits on everything that may go wrong.

KubeRay's own schema is too large to keep here. Set KUBERAY_CRDS to a folder with ray.io_rayclusters.yaml and
ray.io_rayjobs.yaml (ray-operator/config/crd/bases of ray-project/kuberay) and the files are held to it as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.submit import STOP_WAIT_SECONDS
from pipeline.config.io.loader import load_job

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
STAGES = ("ingest", "train_vae", "encode", "train_flow", "generate", "evaluate")
CLUSTER_FIELDS = {
    *("rayVersion", "enableInTreeAutoscaling", "authOptions", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"),
}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
JOB_FIELDS = {
    *("entrypoint", "submissionMode", "backoffLimit", "activeDeadlineSeconds", "submitterConfig", "deletionStrategy"),
    *("submitterPodTemplate", "rayClusterSpec"),
}
CONTAINER_FIELDS = {
    *("name", "image", "workingDir", "securityContext", "env", "resources", "volumeMounts", "lifecycle"),
}


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def spec(stage: str) -> dict[str, Any]:
    return documents(ROOT / "cluster" / "kuberay" / f"{stage}.yaml")[0]["spec"]


def clusters() -> dict[str, dict[str, Any]]:
    return {"cluster": spec("cluster"), **{s: spec(s)["rayClusterSpec"] for s in STAGES}}


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [g["template"]["spec"] for g in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def test_every_stage_has_a_job_and_all_start_the_same_cluster():
    whole = clusters()["cluster"]
    groups = {g["groupName"]: g for g in whole["workerGroupSpecs"]}
    for stage, found in clusters().items():
        assert {k: v for k, v in found.items() if k != "workerGroupSpecs"} == {
            k: v for k, v in whole.items() if k != "workerGroupSpecs"
        }, stage
        assert all(g == groups[g["groupName"]] for g in found["workerGroupSpecs"]), stage


@pytest.mark.parametrize("where", ["cluster", *STAGES])
def test_the_fields_are_kuberays(where):
    found = clusters()[where]
    assert set(found) == CLUSTER_FIELDS
    assert all(set(g) == GROUP_FIELDS for g in found["workerGroupSpecs"])
    for pod in pods(found):
        assert set(pod["containers"][0]) <= CONTAINER_FIELDS
        mounted = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("where", ["cluster", *STAGES])
def test_groups_grow_from_zero_behind_a_token_without_root(where):
    found = clusters()[where]
    assert found["authOptions"] == {"mode": "token"}
    assert found["autoscalerOptions"]["version"] == "v2"
    assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(g["minReplicas"] == g["replicas"] == 0 < g["maxReplicas"] for g in found["workerGroupSpecs"])
    for pod in pods(found):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_a_pod_has_time_to_leave_a_checkpoint_before_it_is_killed():
    whole = clusters()["cluster"]
    head = whole["headGroupSpec"]["template"]["spec"]
    env = {e["name"]: e["value"] for e in head["containers"][0]["env"]}
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) == STOP_WAIT_SECONDS
    assert head["terminationGracePeriodSeconds"] >= STOP_WAIT_SECONDS
    gpu = next(g for g in whole["workerGroupSpecs"] if g["groupName"] == "a100")["template"]["spec"]
    drain = gpu["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert drain[:5] == ["python", "-m", "pipeline", "cluster", "drain"]
    assert gpu["terminationGracePeriodSeconds"] >= int(drain[drain.index("--seconds") + 1]) + 60


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_has_an_end_whatever_happens(stage):
    job = spec(stage)
    assert set(job) == JOB_FIELDS
    assert job["activeDeadlineSeconds"] > 0
    assert 0 < job["backoffLimit"] <= 5
    rules = [(r["policy"], *sorted(r["condition"].items())) for r in job["deletionStrategy"]["deletionRules"]]
    assert len(rules) == len(set(rules))
    ends = {
        next(iter(r["condition"].items())) for r in job["deletionStrategy"]["deletionRules"] if "Cluster" in r["policy"]
    }
    assert ends == {("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_runs_a_file_whose_workers_fit_a_pod(stage):
    found = spec(stage)
    job = load_job(ROOT / found["entrypoint"])
    assert job.kind == stage
    room = 0
    for group in found["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        want = {"CPU": job.resources.cpus_per_worker, "GPU": job.resources.gpus_per_worker}
        room += int(min(has[r] // n for r, n in want.items() if n)) * group["maxReplicas"]
    assert room >= max(job.resources.workers.max, job.resources.actors_max)


def test_only_the_clusters_own_pods_and_the_operator_reach_it():
    policy = next(d for d in documents(ROOT / "cluster" / "kuberay" / "base.yaml") if d["kind"] == "NetworkPolicy")
    guarded = set(policy["spec"]["podSelector"]["matchExpressions"][0]["values"])
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])  # an empty list would mean everybody
    for found in clusters().values():
        for group in [found["headGroupSpec"], *found["workerGroupSpecs"]]:
            assert group["template"]["metadata"]["labels"]["app"] in guarded


# ---- KubeRay's own schema, where it is at hand ---------------------------------------------------------------------
def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema in which an unknown field is an error."""
    if not isinstance(schema, dict):
        return schema
    out = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes") and k != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        out = {"type": ["integer", "string"]}
    if "properties" in out:
        out["properties"] = {k: strict(v) for k, v in out["properties"].items()}
        if "additionalProperties" not in out and not schema.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = strict(out[key])
    return out


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's schema")
@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "base"], ids=lambda p: p.name)
def test_kuberays_schema_takes_the_file(path):
    import jsonschema

    document = documents(path)[0]
    plural = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}[document["kind"]]
    crd = yaml.safe_load((Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{plural}.yaml").read_text())
    schema = strict(next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft7Validator(schema)
    assert [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(document)] == []
    document["spec"]["rayVersoin"] = "2.60.0"
    assert list(validator.iter_errors(document)), "the check lets a misspelt field through"
