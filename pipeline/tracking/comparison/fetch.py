"""Read runs from MLflow as records of stages, for `scldm runs compare`; no folder is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.config.job import IN_ORDER
from pipeline.tracking.comparison.records import SHOWN_FACTS, Measured, StageRecord, select_pipeline
from pipeline.tracking.mlflow_runs.client import mlflow_client
from scldm.errors import InputError

RUN_ID = re.compile(r"[0-9a-f]{32}")
FLOOR = "_floor"


def is_run(name: str) -> bool:
    """Return whether an argument names a run or a model, not a folder."""
    return bool(RUN_ID.fullmatch(name)) or name.startswith(("runs:/", "models:/"))


def from_run(name: str, uri: str) -> list[StageRecord]:
    """Return the pipeline of a run id, `runs:/<id>`, `models:/<name>@<alias>` or `models:/<name>/<version>`.

    Raises:
        InputError: The store does not know it, or does not answer.
    """
    from mlflow.exceptions import MlflowException

    client = mlflow_client(uri)
    try:
        run = client.get_run(_run_id(name, client))
        key = run.data.tags.get("scldm.pipeline")
        if key is None:
            raise InputError(
                f"{name}: run {run.info.run_id} of {uri} was not made by scldm (it has no tag scldm.pipeline)"
            )
        runs = _all_runs(client, run.info.experiment_id, key)
    except MlflowException as error:
        raise InputError(f"{name}: {uri} answers: {str(error).splitlines()[0][:300]}") from error
    records = [record_from_run(r) for r in runs if r.data.tags.get("scldm.stage") != "pipeline"]
    if not records:
        raise InputError(f"{name}: the pipeline {key} has no run of a stage in {uri}")
    whole = run.data.tags.get("scldm.stage") == "pipeline"
    return select_pipeline(None if whole else record_from_run(run), records)


def _run_id(name: str, client: Any) -> str:
    if name.startswith("runs:/"):
        return name.removeprefix("runs:/").split("/")[0]
    if not name.startswith("models:/"):
        return name
    model, at, alias = name.removeprefix("models:/").partition("@")
    if at:
        version = client.get_model_version_by_alias(model, alias)
    else:
        model, slash, number = model.rpartition("/")
        if not slash:
            raise InputError(f"{name}: give a version: models:/{number}@champion, or models:/{number}/1")
        version = client.get_model_version(model, number)
    return str(version.run_id)


def _all_runs(client: Any, experiment_id: str, key: str) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_runs([experiment_id], f"tags.`scldm.pipeline` = '{key}'", page_token=token)
        found += page
        if not (token := page.token):
            return found


def record_from_run(run: Any) -> StageRecord:
    """Return the record of a run that this project logged."""
    tags: Mapping[str, str] = run.data.tags
    stage = tags.get("scldm.stage", "?")
    about = {"code": tags.get("scldm.git_sha", ""), "data_digest": tags.get("scldm.data_digest", "")}
    about["census_version"] = tags.get("scldm.census_version", "")
    return StageRecord(
        stage=stage,
        version=tags.get("scldm.version", "?"),
        inputs={s: tags[f"scldm.{s}_version"] for s in IN_ORDER if f"scldm.{s}_version" in tags},
        params={k: v for k, v in run.data.params.items() if k.partition(".")[0] not in IN_ORDER},  # of the stage itself
        metrics=_scores(run.data.metrics) if stage == "evaluate" else _trained(run.data.metrics),
        finished_at=(run.info.end_time or 0) / 1000,
        location=run.info.run_id,
        about={k: v for k, v in about.items() if v},
    )


def _scores(metrics: Mapping[str, float]) -> dict[str, Measured]:
    """Pair eval/<name> with eval/<name>_floor."""
    values = {k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/")}
    return {k: Measured(v, values.get(k + FLOOR)) for k, v in values.items() if not k.endswith(FLOOR)}


def _trained(metrics: Mapping[str, float]) -> dict[str, Measured]:
    return {k: Measured(float(metrics[k])) for k in SHOWN_FACTS if k in metrics}
