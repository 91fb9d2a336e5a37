"""Reads that survive a store which fails for a while: the whole read is repeated, after the store was opened again.

Only failures that pass by themselves are repeated (`Failure.passes`): a missing bucket or a refused key is said at
once. A read changes nothing, so repeating it is safe. Waits double and are drawn at random below that (jitter): a
thousand readers that were turned away together must not come back together.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.data.soma.s3_errors import explain, failure
from scldm.errors import InputError

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backoff:
    """How often and how long; seconds."""

    tries: int = 5
    first: float = 1.0
    longest: float = 20.0
    budget: float = 60.0  # no new try is begun after so long

    def wait(self, attempt: int, draw: float) -> float:
        """Seconds before the next try.

        Args:
            attempt: Failed tries so far, from 1.
            draw: Uniform in [0, 1).
        """
        return min(self.longest, self.first * 2 ** (attempt - 1)) * (0.5 + draw / 2)


def retried(
    read: Callable[[], T],
    *,
    uri: str,
    tiledb_config: Any,
    reopen: Callable[[], Any],
    backoff: Backoff = Backoff(),
    sleep: Callable[[float], Any] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[], float] = random.random,
) -> T:
    """What `read` returns, in the end.

    Args:
        uri: For messages.
        reopen: Forgets open handles; called before every new try.

    Raises:
        InputError: The failure does not pass, or has not passed; names address, region, tries and remedy.
        Exception: What `read` raised, if it does not come from the object store.
    """
    began = clock()
    for attempt in range(1, backoff.tries + 1):
        try:
            return read()
        except InputError:
            raise
        except Exception as error:
            found = failure(error)
            if found.kind == "other":
                raise
            wait, spent = backoff.wait(attempt, draw()), clock() - began
            if not found.passes or attempt == backoff.tries or spent + wait > backoff.budget:
                message = explain(uri, tiledb_config, found, tries=attempt, seconds=spent)
                raise InputError(message) from error
            logger.warning("%s: %s; try %d follows in %.1f s", uri, found.detail, attempt + 1, wait)
            reopen()
            sleep(wait)
    raise AssertionError("the last try returns or raises")


def survives_faults(method: Callable[..., T]) -> Callable[..., T]:
    """For methods of a store with `uri`, `tiledb_config` and `forget()`; a store on disk is read without a detour."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> T:
        if "://" not in self.uri or self.uri.startswith("file://"):
            return method(self, *args, **kwargs)
        return retried(
            lambda: method(self, *args, **kwargs),
            uri=self.uri,
            tiledb_config=self.tiledb_config,
            reopen=self.forget,
        )

    return wrapped
