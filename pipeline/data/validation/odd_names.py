"""Warns of names that reports cannot show as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pandas as pd

from pipeline.data.findings import Finding, warning
from scldm.text import LONGEST

_ODD = re.compile(r"[<>&\"\x00-\x1f\x7f]")


def odd_findings(what: str, names: Sequence[str] | pd.Series) -> Iterator[Finding]:
    """Warn of names with markup or control characters, and of very long ones.

    Args:
        what: What is named, in the plural.
    """
    texts = [str(x) for x in names]
    if odd := [x for x in texts if _ODD.search(x)]:
        yield warning(f"{len(odd)} {what} hold markup or control characters", "reports escape them; rename them",
                      count=len(odd), first=odd)  # fmt: skip
    if long := [x for x in texts if len(x) > 2 * LONGEST]:
        yield warning(f"{len(long)} {what} are longer than {2 * LONGEST} characters", "they are cut in reports",
                      count=len(long), first=long)  # fmt: skip
