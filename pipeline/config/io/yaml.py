"""A YAML reader that keeps line numbers: plain data, and the line of every key.

Only data: no tags, no interpolation, no merge keys. Scalars follow YAML 1.2 (`no` is text, `2025-01-30` is text, `1e-3`
is a number), because YAML 1.1 would turn cell types and Census versions into something else. Limits on size, depth and
aliases protect against hostile files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from scldm.errors import InputError

MAX_BYTES = 1_000_000
MAX_DEPTH = 30
MAX_NODES = 20_000  # once written, and once aliases are followed

Key = str | int
KeyPath = tuple[Key, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".nan": float("nan"), ".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf")}
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_PLAIN_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """The data of a file and, for every path in it, the line of its key."""

    data: Any
    lines: dict[KeyPath, int]


def read_document(text: str, where: str) -> Document:
    """Parse one YAML document. Errors name `where:line: column`."""
    _check_shape(text, where)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _syntax_error(error, where) from None
    if root is None:
        return Document(None, {})
    walker = _Walker(where)
    return Document(walker.value(root, ()), walker.lines)


def decode(raw: bytes, where: str) -> str:
    """Decode the bytes of a file; an error says how to save it instead."""
    if len(raw) > MAX_BYTES:
        raise InputError(
            f"{where}: larger than {MAX_BYTES:,} bytes. A job file is a page of YAML; is this the right file?"
        )
    if raw.startswith(b"\xef\xbb\xbf"):
        raise InputError(
            f"{where}:1: starts with a byte-order mark, which hides the #! line. Save it as UTF-8 without BOM"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{where}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8. A job file is YAML text saved as UTF-8"
        ) from None


def _check_shape(text: str, where: str) -> None:
    """Check depth and number of values on parser events, before anything recursive or in memory handles the file."""
    depth = nodes = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            nodes += isinstance(event, yaml.NodeEvent)
            if nodes > MAX_NODES:
                raise _at(where, event.start_mark, f"more than {MAX_NODES:,} names and values")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise _at(where, event.start_mark, f"nested deeper than {MAX_DEPTH} levels")
    except yaml.YAMLError as error:
        raise _syntax_error(error, where) from None


def _syntax_error(error: yaml.YAMLError, where: str) -> InputError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    if mark is None:
        return InputError(f"{where}: not YAML text ({problem})")
    if "'\\t'" in str(problem):
        problem = "a tab; YAML is indented with spaces"
    elif context := getattr(error, "context", None):
        problem = f"{context}, {problem}"
    return _at(where, mark, problem)


def _at(where: str, mark: Any, message: str) -> InputError:
    line, column = (0, 0) if mark is None else (mark.line, mark.column)
    return InputError(f"{where}:{line + 1}: column {column + 1}: {message}")


class _Walker:
    """Converts nodes to plain data. Aliases are followed and counted, and must not be recursive."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[KeyPath, int] = {}
        self.nodes = 0
        self.open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self._error(node, f"more than {MAX_NODES:,} values once aliases (*name) are followed")
        if id(node) in self.open:
            raise self._error(node, "an alias (*name) that contains itself")
        self._refuse_tag(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self.open.add(id(node))
        try:
            return self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key must be a word, not a list or a map")
            key = key_node.value
            line = key_node.start_mark.line + 1
            if key in found:
                raise self._error(key_node, f"{dotted((*path, key))} is written twice, first on line {first[key]}")
            first[key] = line
            self.lines.setdefault((*path, key), line)
            found[key] = self.value(value_node, (*path, key))
        return found

    def _sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        items = []
        for i, item in enumerate(node.value):
            self.lines.setdefault((*path, i), item.start_mark.line + 1)
            items.append(self.value(item, (*path, i)))
        return items

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = node.value
        if "${" in text:
            remedy = "write the value itself, or $NAME for a variable in a path"
            raise self._error(node, f'"{text}": interpolation (${{…}}) is not read; {remedy}')
        if node.style is not None:  # quoted or block: always text
            return text
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if text.lower() in _SPECIAL:
            return _SPECIAL[text.lower()]
        if _INT.fullmatch(text) and len(text) < 400:
            return int(text)
        return float(text) if _FLOAT.fullmatch(text) else text

    def _refuse_tag(self, node: yaml.Node) -> None:
        if not node.tag.startswith(_PLAIN_TAG) or "python" in node.tag:
            raise self._error(node, f"tag {node.tag}: a job file is plain data and has no tags")

    def _error(self, node: yaml.Node, message: str) -> InputError:
        return _at(self.where, node.start_mark, message)


def dotted(path: KeyPath) -> str:
    """("generate", "cells", 0, "n_cells") -> generate.cells[0].n_cells"""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".")
