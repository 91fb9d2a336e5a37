"""Find the classes that are asked for on the command line: `B cell`, or `cell_type=B cell` where two labels have it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from scldm.errors import InputError
from scldm.text import did_you_mean

if TYPE_CHECKING:
    from scldm.data.vocabulary import LabelVocabulary, Vocabulary


SHOWN = 8  # classes of a label, in a message


def asked_classes(
    texts: Sequence[str], vocabulary: Vocabulary, problems: list[str], *, option: str, may_be_empty: bool = False
) -> dict[str, list[str | None]]:
    """Return label -> the classes asked for, in the order of the labels' first mention.

    Args:
        texts: CLASS or LABEL=CLASS.
        option: Name of the option, for messages.
        may_be_empty: Whether `LABEL=` is allowed: without the label, None.
    """
    found: dict[str, list[str | None]] = {}
    for text in texts:
        meant = _meant(text, vocabulary, problems, option=option, may_be_empty=may_be_empty)
        if meant is not None and meant[1] not in found.setdefault(meant[0], []):
            found[meant[0]].append(meant[1])
    return found


def combinations(classes: dict[str, list[str | None]]) -> list[dict[str, str | None]]:
    """Return every combination of classes of different labels, a dictionary each; one empty one without classes."""
    return [dict(zip(classes, row, strict=True)) for row in product(*classes.values())]


def _meant(
    text: str, vocabulary: Vocabulary, problems: list[str], *, option: str, may_be_empty: bool
) -> tuple[str, str | None] | None:
    """Return the label and the class of a text; None after a problem."""
    having = [(label.name, name) for label in vocabulary.labels if (name := label.find(text)) is not None]
    name, equals, value = text.partition("=")
    named = next((x for x in vocabulary.labels if equals and x.name == name.strip()), None)
    if named is not None:
        if may_be_empty and not value.strip():
            return named.name, None
        try:
            having.append((named.name, named.asked(value.strip())))
        except InputError as error:
            if not having:
                problems.append(f"{option} {text!r}: {error}")
                return None
    if len(having) == 1:
        return having[0]
    problems.append(_several(text, having, option) if having else _unknown(text, vocabulary.labels, option))
    return None


def _several(text: str, having: Sequence[tuple[str, str]], option: str) -> str:
    ways = " or ".join(f"{option} '{label}={name}'" for label, name in having)
    return f"{option} {text!r} is a class of {' and '.join(label for label, _ in having)}: write {ways}"


def _unknown(text: str, labels: Sequence[LabelVocabulary], option: str) -> str:
    if not labels:
        return f"{option} {text!r}: the model has no labels"
    name, equals, _ = text.partition("=")
    known = "; ".join(f"{x.name} ({_some(x.classes)})" for x in labels)
    if equals and (hint := did_you_mean(name, [x.name for x in labels])):
        return f"{option} {text!r}: the model has no label {name!r}, {hint} labels: {known}"
    homes = {c: x.name for x in reversed(labels) for c in x.classes}
    near = did_you_mean(text, homes, n=3)
    return f"{option} {text!r}: no label of the model has this class{', ' + near if near else ''}; labels: {known}"


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:SHOWN]) + (f", … {len(classes):,} in all" if len(classes) > SHOWN else "")
