"""Keeps addresses of this machine away from proxies: a proxy cannot reach the services that a job starts here."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bypass_proxies(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the loopback addresses to NO_PROXY and no_proxy, which requests, curl and gRPC read; children inherit it."""
    given = [x.strip() for key in ("NO_PROXY", "no_proxy") for x in environment.get(key, "").split(",") if x.strip()]
    every = ",".join(dict.fromkeys([*given, *LOOPBACK]))
    environment["NO_PROXY"] = environment["no_proxy"] = every
