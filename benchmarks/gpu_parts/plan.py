"""Runs parts one after another within a number of minutes; what fails is said with its error, and the rest goes on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A row of DESIGN 4.8: `ratio` is ours over the baseline, larger is better."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    n: int = 1
    spread: tuple[float, float] | None = None


class Skipped(Exception):
    """Raised by a part that this machine cannot run; the text says why."""


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    state: str = "done"  # done, failed, skipped
    seconds: float = 0.0
    why: str = ""
    rows: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was not measured, and why; what the part found in words
    errors: list[str] = field(default_factory=list)

    def about(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "rows"}


class Budget:
    """The time that a part may take; `left()` is what remains of it, in seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()


@dataclass(frozen=True)
class Part:
    name: str
    share: float  # of the time that is left when it starts, relative to the parts after it
    work: Callable[[Outcome, Budget], None]


def run_parts(parts: Sequence[Part], seconds: float, say: Callable[[str], None]) -> list[Outcome]:
    """Run the parts. Each gets its share of the time that is left; what one does not use goes to the others."""
    whole, found = Budget(seconds), []
    for i, part in enumerate(parts):
        share = part.share / sum(p.share for p in parts[i:])
        outcome, started = Outcome(part.name), time.monotonic()
        try:
            part.work(outcome, Budget(max(0.0, whole.left()) * share))
            if outcome.errors:
                outcome.state, outcome.why = "failed", f"{len(outcome.errors)} errors"
        except Skipped as reason:
            outcome.state, outcome.why = "skipped", str(reason)
        except Exception as error:
            outcome.state, outcome.why = "failed", described(error)
            outcome.errors.append(traceback.format_exc())
        outcome.seconds = round(time.monotonic() - started, 1)
        say(f"{part.name}: {outcome.state} in {outcome.seconds:.0f} s{f' ({outcome.why})' if outcome.why else ''}")
        found.append(outcome)
    return found


def described(error: BaseException) -> str:
    """Type, first line and place of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}{at}"
