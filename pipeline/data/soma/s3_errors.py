"""Interprets failures of object storage, and explains them with the settings of `ingest.source.s3`.

Three layers retry. The S3 client inside TileDB repeats a request that failed (`tries`, waits from 25 ms, doubling); a
503 SlowDown or a 429 it repeats up to a hundred times, 1.5 s apart, regardless of `tries`. Above it,
`pipeline/data/soma/retry.py` opens the store again and repeats the whole block. Above that, Ray repeats the task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# ---- failures ----------------------------------------------------------------------------------------------------
_HTTP = re.compile(r"HTTP Response Code: (-?\d+)")
_NAME = re.compile(r"(?:\[Exception: |ExceptionName: )(\w+)")
_CURL = re.compile(r"curlCode: (\d+), ([^;\]\[]+)")
_NO_SUCH_HOST = 6
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_REFUSED = {
    "AccessDenied",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_BUSY = {"RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}


@dataclass(frozen=True)
class Failure:
    """A failure of TileDB's S3 client, read from its message."""

    kind: Literal["no bucket", "refused", "wrong region", "unreachable", "busy", "other"]
    detail: str  # a few words of the original

    @property
    def is_temporary(self) -> bool:
        """Whether another attempt may succeed."""
        return self.kind in ("unreachable", "busy")


def failure(error: BaseException) -> Failure:
    """Classify an error by its message; "other" if it does not come from S3."""
    text = str(error)
    code, name, curl = (p.search(text) for p in (_HTTP, _NAME, _CURL))
    http, word = int(code[1]) if code else 0, name[1] if name else ""
    if curl:
        return Failure("unreachable", f"{curl[2].strip()} (curl {curl[1]})")
    detail = " ".join(filter(None, [f"HTTP {http}" if http > 0 else "", word])) or text[:200]
    if word == "NoSuchBucket":
        return Failure("no bucket", detail)
    if word in _WRONG_REGION or http == 301:
        return Failure("wrong region", detail)
    if word in _REFUSED or http in (401, 403):
        return Failure("refused", detail)
    if word in _BUSY or http == 429 or http >= 500:
        return Failure("busy", detail)
    if http == -1:
        return Failure("unreachable", detail)
    return Failure("other", detail)


def explain(uri: str, tiledb_config: Mapping[str, Any], found: Failure, *, tries: int, seconds: float) -> str:
    """Return a message: what happened, what was tried, and how to fix it."""
    server = tiledb_config.get("vfs.s3.endpoint_override")
    region = tiledb_config.get("vfs.s3.region")
    signed = str(tiledb_config.get("vfs.s3.no_sign_request", "false")) != "true"
    account = "with" if signed else "without"
    where = f"{uri} (region {region or 'not set'}, server {server or 'AWS'}, {account} credentials)"
    bucket = uri.split("/")[2] if uri.count("/") > 1 else uri
    tried = f"{tries} {'try' if tries == 1 else 'tries'} in {seconds:.0f} s"
    what, remedy = {
        "no bucket": (
            f"there is no bucket {bucket!r}",
            "check ingest.source.uri, and ingest.source.s3.endpoint if the bucket is not at AWS",
        ),
        "refused": (
            "the server refuses access",
            "check the credentials that AWS tools use (AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws, the machine's role) and "
            "whether they may list and read the bucket"
            if signed
            else "the data are not public: set ingest.source.anonymous: false and give credentials",
        ),
        "wrong region": ("the bucket is in another region", "set ingest.source.region to the region of the bucket"),
        "unreachable": (
            f"the server cannot be reached; gave up after {tried}",
            "check the network, a proxy or firewall, ingest.source.region and ingest.source.s3.endpoint; without a "
            "network, read a copy on disk: ingest.source.uri: <folder>",
        ),
        "busy": (
            f"the server keeps failing; gave up after {tried}",
            "lower ingest.source.s3.max_parallel or the number of readers, or try later",
        ),
        "other": ("it cannot be read", "check ingest.source.uri"),
    }[found.kind]
    return f"{where}: {what} [{found.detail}]; {remedy}"
