"""Locates a release of the CELLxGENE Census.

The release is looked up once, on the driver, and its date is recorded; workers get a plain address and need no
directory service. "stable" and "latest" change over time, so later stages read the date that the name stood for. The
bucket is public and read without an account. This is the only module that imports cellxgene_census.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.job import CensusSource
from pipeline.data.soma.store import SomaStore
from scldm.errors import InputError
from scldm.text import choices_hint

TRIES = 4
FIRST_WAIT = 1.0  # seconds; doubles
_DATED = re.compile(r"^\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True)
class CensusRelease:
    """A dated release and the experiment of an organism in it."""

    version: str  # the date
    store: SomaStore


def locate_census(source: CensusSource, *, sleep: Callable[[float], Any] = time.sleep) -> CensusRelease:
    """Look up a release by its version: a date, or a name that stands for one ("stable", "latest").

    Raises:
        InputError: the version is unknown or was retracted, or the directory of releases cannot be reached.
    """
    from cellxgene_census import get_census_version_directory

    directory = _fetch(get_census_version_directory, sleep)
    release = directory.get(source.version)
    if release is None:
        dated = sorted((v for v in directory if _DATED.match(v)), reverse=True)
        names = [v for v in directory if not _DATED.match(v)]
        hint = choices_hint(source.version, [*dated[:12], *names], "releases")
        raise InputError(
            f"ingest.source.version: the Census has no release {source.version!r}, or retracted it ({hint})"
        )
    version = source.version if _DATED.match(source.version) else str(release.get("release_build"))
    if not _DATED.match(version):
        raise InputError(
            f"ingest.source.version {source.version!r}: the directory does not say which date it stands for "
            f"(release_build is {version!r}); pin a date, for example 2025-01-30"
        )
    uri, region = _locate(release["soma"], sleep)
    config = {"vfs.s3.no_sign_request": "true", "vfs.s3.region": region}
    return CensusRelease(version, SomaStore(f"{uri.rstrip('/')}/census_data/{source.organism}", config, "RNA", "raw"))


def _locate(where: dict[str, Any], sleep: Callable[[float], Any]) -> tuple[str, str]:
    """Return address and region. A release may give only its path, on the Census's own mirror on S3."""
    if where.get("uri"):
        return where["uri"], where.get("s3_region") or "us-west-2"
    from cellxgene_census import get_census_mirror_directory

    mirrors = [m for m in _fetch(get_census_mirror_directory, sleep).values() if m.get("provider") == "S3"]
    if not mirrors:
        raise InputError("ingest.source: the Census names no mirror on S3; read a copy with type: soma, uri: …")
    base = mirrors[0]["base_uri"].rstrip("/")
    return f"{base}/{where['relative_uri'].lstrip('/')}", mirrors[0].get("region") or "us-west-2"


def _fetch(request: Callable[[], Any], sleep: Callable[[float], Any], tries: int = TRIES) -> dict[str, Any]:
    """Fetch from the Census's directory, with retries; its own client tries once."""
    for attempt in range(tries):
        try:
            return dict(request())
        except (OSError, ValueError) as error:  # errors of requests are OSErrors; ValueError: the response is not JSON
            last = error
            if attempt < tries - 1:
                sleep(FIRST_WAIT * 2**attempt)
    raise InputError(
        f"ingest.source: the Census directory could not be reached in {tries} tries ({type(last).__name__}); check the "
        "network or a proxy (HTTPS_PROXY), or read a copy with ingest.source: {type: soma, uri: <copy>/census_data/…}"
    ) from last
