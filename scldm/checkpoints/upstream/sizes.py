"""Convert upstream's size factors to our library-size statistics, and back.

Upstream keeps the mean and the standard deviation of log(library size) in two pickles. One label at a time:
`{label: {class: value}}`. Labels together: `{"a_b": {"class of a_class of b": value}}`. It has neither an entry for
all cells nor numbers of cells. Ours needs the first: it is the mixture, in equal parts, of the classes of the first
label in alphabetical order (the one whose statistics upstream would use), or of the combinations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scldm.data.library_size import ALL, LibrarySizes, LogNormal, condition_key
from scldm.errors import CheckpointError

NOT_GIVEN = "the model was converted from upstream without size factors"


@dataclass(frozen=True)
class SizeFactors:
    """Upstream's two tables: name of the label or labels -> class or classes -> value."""

    mu: Mapping[str, Mapping[str, float]]
    sd: Mapping[str, Mapping[str, float]]


def library_sizes_from_upstream(
    factors: SizeFactors, classes: Mapping[str, Sequence[str]]
) -> tuple[LibrarySizes, list[str]]:
    """Return our statistics, and notes on what was left out or is missing.

    Args:
        factors: Upstream's tables.
        classes: Classes per label, labels in the order of upstream's configuration.
    """
    _check_tables(factors)
    table: dict[str, LogNormal] = {}
    mixtures: dict[str, list[LogNormal]] = {}
    notes = []
    joint = "_".join(classes)
    for name, means in factors.mu.items():
        if name not in classes and name != joint:
            notes.append(f"size factors of {name}: the model has no such label")
            continue
        seen = [_condition(name, token, classes) for token in means]
        for condition, (token, mean) in zip(seen, means.items(), strict=True):
            key = condition_key(condition)
            table[key] = LogNormal(float(mean), float(factors.sd[name][token]), None, key)
            mixtures.setdefault(name, []).append(table[key])
        expected = math.prod(len(classes[label]) for label in seen[0]) if seen else 0
        if len(seen) < expected:
            notes.append(f"size factors of {name}: {expected - len(seen)} of {expected} are not given; they fall back")
    if not table:
        raise CheckpointError(
            f"size factors are for {', '.join(factors.mu) or 'nothing'}; the model has {', '.join(classes)}"
        )
    first = joint if joint in mixtures else min(mixtures)
    return LibrarySizes({**dict(sorted(table.items())), ALL: _mixture(mixtures[first])}), notes


def size_factors_to_upstream(sizes: LibrarySizes, classes: Mapping[str, Sequence[str]]) -> SizeFactors:
    """Return upstream's tables of our statistics: one per label, and one of all labels together if we have it."""
    named = {label: {c: {label: c} for c in own} for label, own in classes.items()}
    if len(classes) > 1:
        together = [
            dict(zip(classes, combination, strict=True)) for combination in itertools.product(*classes.values())
        ]
        together = [condition for condition in together if condition_key(condition) in sizes.table]
        named["_".join(classes)] = tokens = {"_".join(condition.values()): condition for condition in together}
        if lost := [c for c in together if tokens["_".join(c.values())] != c]:
            raise CheckpointError(
                f"upstream joins classes with underscores: {lost[0]} and {tokens['_'.join(lost[0].values())]} would"
                " have one name"
            )
    found = {
        name: {token: s for token, c in tokens.items() if (s := sizes.table.get(condition_key(c))) is not None}
        for name, tokens in named.items()
    }
    return SizeFactors(
        {name: {token: s.mean for token, s in table.items()} for name, table in found.items() if table},
        {name: {token: s.sd for token, s in table.items()} for name, table in found.items() if table},
    )


def _check_tables(factors: SizeFactors) -> None:
    for statistic, table in (("mean", factors.mu), ("standard deviation", factors.sd)):
        for name, values in table.items():
            if not isinstance(values, Mapping):
                raise CheckpointError(f"size factors: the {statistic}s of {name} must be a dictionary; got {values!r}")
            for token, value in values.items():
                usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                if not usable or (statistic != "mean" and value < 0):
                    raise CheckpointError(f"size factors: the {statistic} of {name}, {token} is {value!r}")
    for name in {*factors.mu, *factors.sd}:
        mu, sd = factors.mu.get(name, {}), factors.sd.get(name, {})
        if odd := sorted(mu.keys() ^ sd.keys()):
            raise CheckpointError(f"size factors of {name}: {', '.join(odd[:5])} in one of the two files only")


def _condition(name: str, token: str, classes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the labels and classes that an entry stands for."""
    if name in classes:
        if token not in classes[name]:
            raise CheckpointError(f"size factors: {name} has no class {token!r}; it has {', '.join(classes[name][:8])}")
        return {name: token}
    readings = list(_splits(token, list(classes.items())))
    if len(readings) != 1:
        how = "more than one combination" if readings else "no combination"
        raise CheckpointError(f"size factors: {token!r} is {how} of classes of {', '.join(classes)}")
    return readings[0]


def _splits(token: str, labels: Sequence[tuple[str, Sequence[str]]]) -> Iterator[dict[str, str]]:
    """Yield every way to read a token as classes joined by underscores, one of each label."""
    (name, own), *rest = labels
    if not rest:
        if token in own:
            yield {name: token}
        return
    for c in own:
        if token.startswith(f"{c}_"):
            yield from ({name: c} | more for more in _splits(token[len(c) + 1 :], rest))


def _mixture(parts: Sequence[LogNormal]) -> LogNormal:
    """Return mean and standard deviation of an equal mixture of log-normal statistics."""
    mean = math.fsum(p.mean for p in parts) / len(parts)
    variance = math.fsum(p.sd**2 + (p.mean - mean) ** 2 for p in parts) / len(parts)
    return LogNormal(mean, math.sqrt(variance), None, ALL)


def named_factors(
    table: Mapping[str, Any], classes: Mapping[str, Sequence[str]], *, by_id: bool
) -> dict[str, dict[str, Any]]:
    """Return a table by class names, from one of a checkpoint's own vocabulary.

    Its keys are class ids, or (labels together) names as in the pickle.
    """
    named: dict[str, dict[str, Any]] = {}
    for name, values in table.items():
        if by_id and name in classes:
            wrong = [k for k in values if not k.isdigit() or int(k) >= len(classes[name])]
            if wrong:
                raise CheckpointError(
                    f"size factors in the checkpoint: {name} has {len(classes[name])} classes; got {wrong[0]}"
                )
            values = {classes[name][int(k)]: v for k, v in values.items()}
        named[name] = dict(values)
    return named
