"""Collects the texts of the program that tell a user to change a setting or to run a command.

A text is a string or an f-string; what an f-string puts in is written `{}`. Docstrings and the help of options are
left out, and so are words for a program, such as `--port=1`, which hold no space.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from pipeline.config.io.errors import all_paths
from pipeline.config.job import Job

ROOT = Path(__file__).resolve().parents[3]
PATHS = {path for model in get_args(get_args(Job)[0]) for path in all_paths(model)}
SECTIONS = sorted({path.split(".")[0] for path in PATHS if "." in path} | {"train", "feed", "vae"})
KEYS = sorted({path.rpartition(".")[2] for path in PATHS})
# A setting with its section. At the beginning of a text it is where a fault is, not what to do about it.
SETTING = re.compile(rf"(?<=.)(?<![\w./<-])(?:{'|'.join(SECTIONS)})(?:\.(?:[a-z_]+|{{}}|<stage>))+", re.DOTALL)
# A setting with a value: `key=value`, or `key: value` after a word that asks for it.
VALUE = re.compile(rf"(?<![\w./-])(?:{'|'.join(KEYS)})=|\b(?:set|with|drop|take|by|without|or) (?:{'|'.join(KEYS)}): ",
                   re.IGNORECASE)  # fmt: skip
COMMAND = re.compile(r"(?<![\w./-])(?:scldm|mlflow|ray (?:job|start|attach)|pip|make (?:venv|ui|demo|test)) [a-z`]")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


@dataclass(frozen=True)
class Text:
    module: str  # path from the root of the repository
    line: int
    text: str


@cache
def remedies() -> tuple[Text, ...]:
    """Return every text of the two packages that names a setting or a command, in the order of the files."""
    modules = [path for package in ("pipeline", "scldm") for path in sorted((ROOT / package).rglob("*.py"))]
    found = (text for path in modules for text in texts_of_module(str(path.relative_to(ROOT))))
    return tuple(text for text in found if names_something(text.text))


@cache
def texts_of_module(module: str) -> tuple[Text, ...]:
    """Return every text of a module of the repository."""
    return tuple(texts_of((ROOT / module).read_text(), module))


def remedies_of(source: str, module: str) -> Iterator[Text]:
    """Yield the texts of one module that name a setting or a command."""
    return (found for found in texts_of(source, module) if names_something(found.text))


def texts_of(source: str, module: str) -> Iterator[Text]:
    """Yield the texts of one module."""
    tree = ast.parse(source)
    left_out = {id(node) for node in _left_out(tree)}
    for node in ast.walk(tree):
        text = None if id(node) in left_out else _text(node)
        if text is not None and " " in text.strip():
            yield Text(module, node.lineno, text)  # type: ignore[attr-defined]


def names_something(text: str) -> bool:
    """Whether a text names a setting or a command."""
    return any(pattern.search(text) for pattern in (SETTING, VALUE, COMMAND, OPTION))


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def _left_out(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield docstrings, help of options, and the words of f-strings, which are read as a whole."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield from (part.value for part in node.body if isinstance(part, ast.Expr))
        if isinstance(node, ast.JoinedStr):
            yield from (part for part in node.values if isinstance(part, ast.Constant))
        if isinstance(node, ast.keyword) and node.arg in ("help", "metavar"):
            yield from ast.walk(node)
