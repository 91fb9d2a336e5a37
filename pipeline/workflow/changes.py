"""Tells what has changed since a stage last finished, and which results of version 0.1 are still those of their input.

Version 0.1 knew the size of a single `.h5ad` file, and nothing of several files, Cell Ranger outputs and SOMA
experiments. Its results are kept if no file of the input has changed since that run began, by the time that the file
system keeps; otherwise nobody can tell, and the stage runs again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.ingest import SomaSource
from pipeline.config.input_paths import InputContent, input_contents
from pipeline.core.manifest import Manifest, stage_version
from pipeline.core.nested import changed_settings
from scldm.config import StrictModel
from scldm.errors import InputError

SHOWN = 3  # changes that are named


def reason_to_run(
    config: StrictModel,
    inputs: Mapping[str, Manifest],
    contents: Mapping[str, InputContent],
    rerun: Sequence[str],
    before: Manifest | None,
) -> str:
    """Explain why a stage must run, compared with the last time that it finished."""
    if before is None:
        return "first run"
    moved = {c.setting for key, c in contents.items() if before.contents.get(key) == c.files and not c.named_by_path}
    changes = [x for x in changed_settings(before.config, config.model_dump(mode="json")) if x.split()[0] not in moved]
    reasons = [f"setting changed: {_some(changes)}"] if changes else []
    for key, content in contents.items():
        if key in before.contents and (files := changed_files(before.contents[key], content.files)):
            reasons.append(f"{content.setting} has other content: {_some(files)}")
    if new := [s for s, m in inputs.items() if before.inputs.get(s) != m.version]:
        reasons.append(f"new {', '.join(new)}")
    if not reasons:
        reasons.append(f"{', '.join(rerun)} runs again" if rerun else "the seed or an input file changed")
    return "; ".join(reasons)


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return `changed a.h5ad`, `added b.h5ad` and `removed c.h5ad` for the files that differ."""
    common = [name for name in now if name in before]
    return [
        *(f"changed {name}" for name in common if before[name] != now[name]),
        *(f"added {name}" for name in now if name not in before),
        *(f"removed {name}" for name in before if name not in now),
    ]


def _some(changes: Sequence[str]) -> str:
    more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return ", ".join(changes[:SHOWN]) + more


def check_experiment(ingest: Manifest, command: str) -> None:
    """Raise InputError if an experiment that an earlier ingest reads in place is not what it was.

    Args:
        command: Runs ingest again.
    """
    replay = ingest.config.get("replay") or {}
    sources = {"source": ingest.config.get("source"), "replay.source.uri": replay.get("source")}
    for key, given in sources.items():
        recorded = ingest.contents.get(key)
        if recorded is None or (given or {}).get("type") != "soma" or "cache" in ingest.facts:
            continue  # what is read are the cells that ingest wrote itself
        where = f"ingest.{key.removesuffix('.uri')}."
        content = input_contents(SomaSource.model_validate(given), where=where).get("source")
        if content is not None and (files := changed_files(recorded, content.files)):
            raise InputError(
                f"the experiment {content.value} is not what ingest {ingest.version} read ({_some(files)}), and its "
                f"cells are read in place; run ingest again ({command}), or put the experiment back"
            )


# ---- version 0.1 -------------------------------------------------------------------------------------------------
def versions_of_0_1(
    stage: str, config: StrictModel, inputs: Mapping[str, Manifest], seed: int, contents: Mapping[str, InputContent]
) -> list[str]:
    """Return the versions that 0.1 may have given a stage: it took paths as they were written, with ~ for home."""
    known = sorted((key, c.version_0_1) for key, c in contents.items() if c.version_0_1 is not None)
    settings = config.model_dump(mode="json")
    found = []
    for written in (settings, _with_tilde(settings)):
        version = stage_version(stage, written, inputs, seed=seed)
        found.append(hashlib.sha256(f"{version}{known}".encode()).hexdigest()[:12] if known else version)
    return list(dict.fromkeys(found))


def _with_tilde(value: Any) -> Any:
    """Return plain data with ~ for the home folder at the start of every text."""
    if isinstance(value, dict):
        return {k: _with_tilde(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_tilde(v) for v in value]
    home = f"{Path.home()}/"
    return f"~/{value.removeprefix(home)}" if isinstance(value, str) and value.startswith(home) else value


def changed_since_0_1(manifest: Manifest | None, contents: Mapping[str, InputContent]) -> str:
    """Return why a result with a version of 0.1 must be made again; empty if it is that of its input.

    Args:
        manifest: Of the result; None if it did not finish.
    """
    unsure = [(key, c) for key, c in contents.items() if not c.known_to_0_1]
    if manifest is None:
        return "version 0.1 began it and did not record the content of its input" if unsure else ""
    began = manifest.finished_at - manifest.seconds
    for key, content in unsure:
        recorded = manifest.contents.get(key)  # written when 0.2 first saw that nothing had changed
        if recorded is not None and (files := changed_files(recorded, content.files)):
            return f"{content.setting} has other content: {_some(files)}"
        if recorded is None and content.changed_at >= began:
            return (
                f"version 0.1 did not record the content of {content.setting}, and {content.value} was changed or "
                "copied after that run began"
            )
    return ""
