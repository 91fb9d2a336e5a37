"""Flatten nested settings to dotted keys, and compare two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield `train.max_steps 600 -> 20` for every setting that differs."""
    old, new = flat(before), flat(now)
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            yield f"{key} {old.get(key, 'unset')} -> {new.get(key, 'unset')}"


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one dictionary with dotted keys; lists are values."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}
