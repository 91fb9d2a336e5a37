"""Where a dated release of the CELLxGENE Census is: the only module that knows cellxgene_census.

The release is looked up once, on the driver; workers get a plain address and need no directory service. The bucket is
public and read without an account.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from pipeline.data.soma import SomaStore
from pipeline.data.validate import did_you_mean
from pipeline.job import CensusSource
from pipeline.stage import InputError

TRIES = 4
FIRST_WAIT = 1.0  # seconds; doubles
_DATED = re.compile(r"^\d{4}-\d{2}-\d{2}$")


def locate_census(source: CensusSource, *, sleep: Callable[[float], Any] = time.sleep) -> SomaStore:
    """The organism's experiment in a release.

    Raises:
        InputError: for a version that moves ("stable"), is unknown or was retracted, or if the directory of releases
            cannot be reached.
    """
    if not _DATED.match(source.version):
        raise InputError(
            f"ingest.source.version {source.version!r} does not name a dated release: what it means changes, and a run "
            f"could not be repeated; {_what_to_pin(sleep)}"
        )
    directory = _directory(sleep)
    release = directory.get(source.version)
    if release is None:
        dated = sorted((v for v in directory if _DATED.match(v)), reverse=True)
        hint = did_you_mean(source.version, dated[:12]).replace("columns:", "releases:")
        raise InputError(
            f"ingest.source.version: the Census has no release {source.version!r}, or retracted it ({hint})"
        )
    where = release["soma"]
    config = {"vfs.s3.no_sign_request": "true", "vfs.s3.region": where.get("s3_region") or "us-west-2"}
    return SomaStore(f"{where['uri'].rstrip('/')}/census_data/{source.organism}", config, "RNA", "raw")


def _what_to_pin(sleep: Callable[[float], Any]) -> str:
    try:
        directory = _directory(sleep, tries=1)
    except InputError:
        return "pin one, for example 2025-01-30 (the list of releases cannot be reached from here)"
    lasting = [v for v, d in directory.items() if _DATED.match(v) and d.get("flags", {}).get("lts")]
    return f"pin one; long-term releases: {', '.join(sorted(lasting, reverse=True)[:8]) or 'none'}"


def _directory(sleep: Callable[[float], Any], tries: int = TRIES) -> dict[str, Any]:
    """Releases that have not been retracted, by version; the call itself has no retry."""
    import cellxgene_census

    for attempt in range(tries):
        try:
            return dict(cellxgene_census.get_census_version_directory())
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: an answer that is not JSON
            last = error
            if attempt < tries - 1:
                sleep(FIRST_WAIT * 2**attempt)
    raise InputError(
        f"ingest.source: the Census directory could not be reached in {tries} tries ({type(last).__name__}); check the "
        "network or a proxy (HTTPS_PROXY), or read a copy with ingest.source: {type: soma, uri: <copy>/census_data/…}"
    ) from last
