"""Retries reads from a store that fails temporarily: the store is opened again and the whole read is repeated.

Only failures that are temporary are retried (`Failure.is_temporary`): a missing bucket or a refused key is reported
immediately. A read changes nothing, so repeating it is safe. Waits double, with jitter: a thousand readers that were
refused at the same time must not come back at the same time.
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
    """Number of attempts and waits between them; seconds."""

    tries: int = 5
    first: float = 1.0
    longest: float = 20.0
    budget: float = 60.0  # no attempt is started after this time

    def wait(self, attempt: int, draw: float) -> float:
        """Return the seconds before the next attempt.

        Args:
            attempt: Failed attempts so far, from 1.
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
    """Call `read` until it succeeds, and return its result.

    Args:
        uri: Address for messages.
        reopen: Closes open handles; called before every new attempt.

    Raises:
        InputError: the failure is permanent, or lasted too long; names address, region, attempts and remedy.
        Exception: an error of `read` that does not come from the object store.
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
            if not found.is_temporary or attempt == backoff.tries or spent + wait > backoff.budget:
                message = explain(uri, tiledb_config, found, tries=attempt, seconds=spent)
                raise InputError(message) from error
            logger.warning("%s: %s; attempt %d follows in %.1f s", uri, found.detail, attempt + 1, wait)
            reopen()
            sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def survives_faults(method: Callable[..., T]) -> Callable[..., T]:
    """Retry a method of a store with `uri`, `tiledb_config` and `forget()`; stores on disk are read directly."""

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
