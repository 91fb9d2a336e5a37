"""Read job files: YAML and `a.b=c` overrides to a validated job, and back to YAML.

All errors are reported together, each with its dotted path and its line, or `command line` for an override. Nothing
here imports torch, ray or mlflow, so that `scldm validate` is quick.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.config.io.errors import explain
from pipeline.config.io.named_models import write_out_named_models
from pipeline.config.io.renamed import accept_old_names
from pipeline.config.io.yaml import MAX_BYTES, KeyPath, decode, dotted, read_document
from pipeline.config.job import Job, JobBase
from pipeline.config.paths.expand import JOB_FILE
from scldm.errors import InputError

_KEY_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_adapter: TypeAdapter[Any] = TypeAdapter(Job)


@dataclass
class RawJob:
    """A job before validation, with the place where each value was written."""

    source: str
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    overridden: list[KeyPath] = field(default_factory=list)

    def place(self, path: KeyPath, *, whole_section: bool = False) -> str:
        """Return where a value was written: `file:line`, or the command line.

        Args:
            path: Path of the value; if it is absent, its nearest ancestor in the file is used.
            whole_section: The error is about several keys under `path`, any of which may have been overridden.
        """
        for over in self.overridden:
            if path[: len(over)] == over or (whole_section and over[: len(path)] == path):
                return f"{self.source} (command line)"
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.source}:{self.lines[path[:end]]}"
        return self.source


def load_job(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> JobBase:
    """Read a job file, apply overrides and validate it.

    Raises:
        InputError: The job is invalid; the message holds every error.
    """
    raw = read_raw(Path(path))
    apply_overrides(raw, overrides)
    return validate(raw)


def read_raw(path: Path) -> RawJob:
    """Read a job file as plain data with line numbers; only its YAML is checked."""
    where = str(path)
    if path.is_dir():
        raise InputError(f"{where} is a folder; a job is one YAML file, for example jobs/demo.yaml")
    try:
        with path.open("rb") as f:
            content = f.read(MAX_BYTES + 1)
    except OSError as error:
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))[:8] if path.parent.is_dir() else []
        hint = f"; there are: {', '.join(near)}" if near else ""
        raise InputError(f"{where}: {(error.strerror or str(error)).lower()}{hint}") from None
    document = read_document(decode(content, where), where)
    if not isinstance(document.data, dict):
        got = "empty" if document.data is None else f"a {type(document.data).__name__}"
        raise InputError(f"{where}: a job file holds `key: value` lines, beginning with `kind:`; this one is {got}")
    return RawJob(where, document.data, document.lines)


def apply_overrides(raw: RawJob, overrides: list[str] | tuple[str, ...]) -> None:
    """Apply `a.b=c` overrides. A value replaces the whole previous value; the last one wins."""
    problems = []
    for text in overrides:
        try:
            _apply_override(raw, text)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def _apply_override(raw: RawJob, text: str) -> None:
    key, equals, value = text.partition("=")
    where = f"{raw.source} (command line)"
    if not equals or not _KEY_PATH.fullmatch(key):
        raise InputError(f"{where}: {text!r}: an override is key.path=value, for example train.max_steps=20")
    if not value.strip():
        raise InputError(f"{where}: {key}= has no value. To unset it write {key}=null, for empty text {key}='\"\"'")
    path = tuple(key.split("."))
    section = raw.data
    for depth, part in enumerate(path[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        if not isinstance(section[part], dict):
            what = "a list; give the whole list" if isinstance(section[part], list) else "a value, not a section"
            raise InputError(f"{where}: {key}: {dotted(path[:depth])} is {what}")
        section = section[part]
    section[path[-1]] = read_document(value, f"{where}: {key}").data
    raw.overridden.append(path)


def validate(raw: RawJob) -> JobBase:
    """Validate plain data as a job. JSON mode is strict about types (no "12" for 12, no true for 1)."""
    accept_old_names(raw.data, raw.place)
    write_out_named_models(raw.data, raw.place)
    try:
        return _adapter.validate_json(json.dumps(raw.data), strict=True, context={JOB_FILE: True})
    except ValidationError as error:
        raise InputError("\n".join(sorted(explain(error, raw.data, raw.place), key=_line))) from None


def _line(message: str) -> int:
    """Sort key: order in the file; errors of the command line last."""
    found = re.match(r".*?:(\d+): ", message)
    return int(found[1]) if found else MAX_BYTES


def resolved_yaml(job: JobBase) -> str:
    """Return a job as YAML with every default written out; it loads back to an equal job."""
    plain = job.model_dump(mode="json", context={JOB_FILE: True})
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a job file, for editors."""
    return _adapter.json_schema()


class _Dumper(yaml.SafeDumper):
    """A dumper without anchors, whose floats are floats in YAML 1.2 too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
