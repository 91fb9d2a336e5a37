"""Manifests: the record of a finished stage.

The version of a stage is a hash of its name, its config and the versions of its inputs. The stage works in
`<root>/<stage>/<version>/` and writes `manifest.json` there last, by rename: a manifest means that the stage finished.
Later stages read facts from manifests and never guess a path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic
from scldm.api.folders import STAGE_FORMAT, require_known_format
from scldm.errors import CheckpointError, InputError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The record of a finished stage: what it was made from, and the facts that later stages read."""

    stage: str
    version: str
    folder: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]  # stage -> version
    facts: Mapping[str, Any]
    seconds: float
    finished_at: float
    tracking: Mapping[str, str] = field(default_factory=dict)  # run ids
    contents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # input -> file -> digest; 0.1: empty
    format: int = STAGE_FORMAT

    @classmethod
    def planned(cls, stage: str, version: str, folder: Path) -> Manifest:
        """Return a stand-in for a stage that has not run yet: it has a version and a folder, and no facts."""
        return cls(stage, version, str(folder), {}, {}, {}, seconds=0, finished_at=0)

    @property
    def is_finished(self) -> bool:
        """Return whether the stage has run; False for a `planned` stand-in."""
        return self.finished_at > 0

    def path(self, fact: str) -> Path:
        """Return the path that a fact names, which is relative to this stage's folder."""
        return Path(self.folder) / self.facts[fact]


def stage_version(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Manifest], *, seed: int) -> str:
    """Return the first 12 hex digits of a hash over everything that determines a stage's output.

    Args:
        settings: Plain data, with the digest of its content in place of each input path.
    """
    what = [stage, settings, {k: m.version for k, m in sorted(inputs.items())}, seed]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def write_manifest(manifest: Manifest) -> None:
    """Write a stage's manifest, atomically: from here on the stage counts as finished."""
    write_json_atomic(Path(manifest.folder) / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a stage folder, or None if the stage has not finished there.

    Raises:
        InputError: It is damaged, or a newer version of scldm wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        d = json.loads(path.read_text())
        require_known_format(d, path)
        return Manifest(**{**d, "folder": str(folder)})
    except CheckpointError:  # of a newer version, which is no damage
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete {folder} and run the stage again") from error


def newest_manifest(
    root: Path, stage: str, fits: Callable[[Mapping[str, Any]], bool] = lambda facts: True
) -> Manifest | None:
    """Return the manifest of a stage that finished last under a pipeline's folder, or None.

    Args:
        fits: Whether a stage with these facts is meant.
    """
    found = [m for d in (root / stage).glob("*/") if (m := read_manifest(d)) is not None and fits(m.facts)]
    return max(found, key=lambda m: m.finished_at, default=None)
