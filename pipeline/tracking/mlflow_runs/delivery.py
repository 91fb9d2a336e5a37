"""Deliver records to one MLflow run. Every record may come twice: what it leaves is the same.

A point of a metric is the same to MLflow's SQL store if key, step, time and value are, and each record carries the time
at which it was made; params are sent only where the run has none of that name; tags, files and status replace.

A record that the server refuses (and not the whole run) comes back, so that it cannot stand in the way of the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline.tracking.spool_file import Record

log = logging.getLogger("scldm.tracking")
METRICS_AT_ONCE, OTHERS_AT_ONCE = 500, 100
NOTE = "mlflow.note.content"
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class Delivery:
    """The run of one stage, open.

    Args:
        since: Of a worker that may repeat steps which an earlier attempt took past its checkpoint: when it began, ms.
            Points from then on, at steps that the run holds already, are left out, so that a curve has no step twice.
    """

    def __init__(self, client: Any, run_id: str, name: str, *, since: int | None = None) -> None:
        self.client, self.run_id, self.name, self.since = client, run_id, name, since
        self._start: int | None = None  # of the run, ms
        self._held: dict[str, int] | None = None  # metric -> last step of earlier attempts

    def send(self, records: list[Record]) -> list[Record]:
        """Raises where the server cannot be reached or the run is gone; returns what is refused for good."""
        refused = self._params([r for r in records if r["kind"] == "params"])
        refused += self._metrics([r for r in records if r["kind"] in ("metrics", "system")])
        refused += self._tags([r for r in records if r["kind"] == "tag"])
        for r in records:
            if r["kind"] == "datasets":
                self._datasets(r["value"])
            elif r["kind"] in ("artifact", "packages"):
                refused += self._file(r)
        for r in records:
            if r["kind"] == "status":
                self.client.set_terminated(self.run_id, r["value"], end_time=r["at"])
        return refused

    # ---- numbers and words -----------------------------------------------------------------------------------------
    def _metrics(self, records: list[Record]) -> list[Record]:
        from mlflow.entities import Metric

        points = [(k, v, r) for r in records for k, v in r["value"].items() if not self._repeated(k, r)]
        steps = {id(r): r["step"] if r["kind"] == "metrics" else self._seconds(r["at"]) for r in records}

        def entity(point: tuple[str, float, Record]) -> Any:
            return Metric(point[0], point[1], point[2]["at"], steps[id(point[2])])

        def send(some: Sequence[Any]) -> None:
            self.client.log_batch(self.run_id, metrics=[entity(p) for p in some])

        return [{**r, "value": {k: v}} for k, v, r in self._each(points, send, METRICS_AT_ONCE)]

    def _repeated(self, key: str, record: Record) -> bool:
        if self.since is None or record["kind"] != "metrics":
            return False
        if self._held is None:
            held = self.client.get_run(self.run_id).data.metrics
            self._held = {k: max(m.step for m in self.client.get_metric_history(self.run_id, k)) for k in held}
        if record["at"] < self.since:  # of an earlier attempt, from its spool
            self._held[key] = max(record["step"], self._held.get(key, -1))
            return False
        return bool(record["step"] <= self._held.get(key, -1))

    def _tags(self, records: list[Record]) -> list[Record]:
        from mlflow.entities import RunTag

        pairs = [(k, v, r) for r in records for k, v in r["value"].items()]

        def send(some: Sequence[Any]) -> None:
            self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v, _ in some])

        return [{**r, "value": {k: v}} for k, v, r in self._each(pairs, send, OTHERS_AT_ONCE)]

    def _params(self, records: list[Record]) -> list[Record]:
        """MLflow never changes a param: what differs from the first attempt becomes a tag and a line of the note."""
        if not records:
            return []
        from mlflow.entities import Param

        run = self.client.get_run(self.run_id)
        held = run.data.params
        asked = {k: v for r in records for k, v in r["value"].items()}
        new = [(k, v) for k, v in asked.items() if k not in held]

        def send(some: Sequence[Any]) -> None:
            self.client.log_batch(self.run_id, params=[Param(k, v) for k, v in some])

        refused = self._each(new, send, OTHERS_AT_ONCE)
        changed = [f"{k} {held[k]} -> {v}" for k, v in sorted(asked.items()) if k in held and held[k] != v]
        if changed:
            self._say_changed(changed, run.data.tags)
        return [{**records[-1], "value": {k: v}} for k, v in refused]

    def _say_changed(self, changed: list[str], tags: dict[str, str]) -> None:
        text = "; ".join(changed)[:4000]
        self.client.set_tag(self.run_id, "scldm.changed_params", text)
        note = tags.get(NOTE, "")
        line = f"Attempt {tags.get('scldm.attempt', '?')} went on with other settings: {text}"
        if line not in note:
            self.client.set_tag(self.run_id, NOTE, f"{note}\n\n{line}".strip()[:8000])

    def _each(self, items: Sequence[Any], send: Callable[[Sequence[Any]], None], most: int) -> list[Any]:
        """Send in batches; where a batch is refused, one by one. Those that are refused."""
        from mlflow.exceptions import MlflowException

        refused = []
        for start in range(0, len(items), most):
            some = items[start : start + most]
            try:
                send(some)
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    raise
                self._must_be_active()
                if len(some) > 1:
                    refused += self._each(some, send, max(1, len(some) // 8))
                    continue
                log.warning("tracking of %s: %s is refused: %s", self.name, some[0][0], str(error).splitlines()[0])
                refused += some
        return refused

    def _must_be_active(self) -> None:
        """A deleted run refuses everything, and that is not the fault of a record."""
        if self.client.get_run(self.run_id).info.lifecycle_stage != "active":
            raise RuntimeError(f"run {self.run_id} was deleted")

    def _seconds(self, at: int) -> int:
        """Seconds since the run began: the step of system metrics, which so go on after a restart."""
        if self._start is None:
            self._start = int(self.client.get_run(self.run_id).info.start_time)
        return max(0, (at - self._start) // 1000)

    # ---- files and data sets ---------------------------------------------------------------------------------------
    def _file(self, record: Record) -> list[Record]:
        """Where the artifact store refuses (full, read-only), numbers go on, and `scldm mlflow sync` tries again."""
        try:
            self._store(record)
        except Exception as error:
            self._must_answer()
            what = record["value"]["path"] if record["kind"] == "artifact" else "the list of packages"
            cause = (str(error).splitlines() or [type(error).__name__])[0][:200]
            log.warning("tracking of %s: %s is not stored: %s", self.name, what, cause)
            return [record]
        return []

    def _must_answer(self) -> None:
        """Raises where it is the server that is away, and not its artifact store."""
        try:
            self.client.get_run(self.run_id)
        except Exception:  # after an upload that it refused half-way, a server closes the connection that is used next
            self.client.get_run(self.run_id)

    def _store(self, record: Record) -> None:
        if record["kind"] == "packages":
            names = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
            self.client.log_text(self.run_id, "\n".join(names) + "\n", "env/packages.txt")
            return
        path, folder = Path(record["value"]["path"]), record["value"]["folder"]
        if not path.exists():  # no use in trying again
            log.warning("tracking of %s: %s is gone and was not stored", self.name, path)
        elif path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def _datasets(self, described: list[dict[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for given in described:
            about = {k: v for k, v in given.items() if k != "context"}
            inputs.append(DatasetInput(Dataset(**about), [InputTag("mlflow.data.context", given["context"])]))
        self.client.log_inputs(self.run_id, datasets=inputs)
