"""Paths in settings: `$NAME` and a leading `~` stand for what a shell would put there.

Variables are read where the job is loaded. A variable that is not set is an error, never an empty text: `$SCRATCH/runs`
would become `/runs`.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, SerializationInfo, ValidationInfo

JOB_FILE = "job_file"  # key of pydantic's validation context
_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*))")
_HOME = re.compile(r"^((?:sqlite|file):///|)(~[^/]*)(?=/|$)")


def expand_path(value: str) -> str:
    """Return a path with its variables and home folder put in; `$$` stands for a dollar sign.

    Raises:
        ValueError: A variable is not set, or there is no such user.
    """
    unset: list[str] = []

    def put_in(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name = match[1]
        found = os.environ.get(name, "")
        if not found:
            unset.append(name)
        return found

    expanded = _VARIABLE.sub(put_in, value)
    if unset:
        names = ", ".join(dict.fromkeys(unset))
        raise ValueError(
            f"{value}: no variable {names} is set where this job is loaded; export it, or write the path itself "
            "($$ stands for a dollar sign)"
        )
    if (home := _HOME.match(expanded)) is None:
        return expanded
    place = os.path.expanduser(home[2])
    if place == home[2]:
        raise ValueError(f"{value}: there is no user {home[2][1:]!r} whose home folder {home[2]} could be")
    return f"{home[1]}{place}{expanded[home.end() :]}"


def _in_a_job_file(value: str, info: ValidationInfo) -> str:
    return expand_path(value) if info.context is not None and info.context.get(JOB_FILE) else value


def _for_a_job_file(value: Any, info: SerializationInfo) -> Any:
    is_job_file = info.context is not None and info.context.get(JOB_FILE)
    return value.replace("$", "$$") if is_job_file and isinstance(value, str) else value


PathText = Annotated[str, AfterValidator(_in_a_job_file), PlainSerializer(_for_a_job_file)]
"""A setting that is a path or an address. It is expanded when a job file is read, and not when a record is.

A job that is written as a job file, which pydantic's context says, has `$$` where the path has a dollar sign.
"""
