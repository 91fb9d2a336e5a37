"""Tables of parameter names that translate both ways.

In a name # stands for the number of a block, KIND for weight or bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


class Names:
    """A one-to-one table of names.

    Args:
        names: Theirs to ours.
        theirs, ours: Names of the two models, for messages.
    """

    def __init__(self, names: Mapping[str, str], *, theirs: str, ours: str):
        self._to_ours, self._theirs = _rules(names), theirs
        self._to_theirs, self._ours = _rules({mine: other for other, mine in names.items()}), ours

    def to_ours(self, name: str) -> str:
        """Return our name of one of theirs."""
        return _translated(name, self._to_ours, self._theirs)

    def to_theirs(self, name: str) -> str:
        """Return their name of one of ours."""
        return _translated(name, self._to_theirs, self._ours)


def _rules(names: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for name, other in names.items():
        pattern = re.escape(name).replace(r"\#", r"(?P<n>\d+)").replace("KIND", "(?P<kind>weight|bias)")
        rules.append((re.compile(pattern), other.replace("#", r"\g<n>").replace("KIND", r"\g<kind>")))
    return rules


def _translated(name: str, rules: list[tuple[re.Pattern[str], str]], whose: str) -> str:
    for pattern, other in rules:
        if match := pattern.fullmatch(name):
            return match.expand(other)
    raise KeyError(f"{name!r} is not a parameter of {whose}")
