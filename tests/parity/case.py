"""One recorded case: a description (JSON) and its tensors (safetensors)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scldm.errors import InputError


class CaseError(InputError):
    """Raised for a case that cannot be read or has an unknown form. The message says what is wrong."""


class FolderError(InputError):
    """Raised for a folder that does not hold cases."""


@dataclass(frozen=True)
class Case:
    """A description and its tensors by key."""

    name: str
    folder: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return tensors whose key starts with the prefix, by the rest of their key."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    @property
    def config(self) -> dict[str, Any]:
        return self.fact("config")

    def fact(self, key: str) -> Any:
        """Return a top-level entry of the JSON, which must exist."""
        if key not in self.facts:
            raise CaseError(f"{self.name}.json has no {key!r}; it has {', '.join(sorted(self.facts))}")
        return self.facts[key]


def case_names(folder: Path) -> list[str]:
    """Return the names of the cases in a folder: every *.json and *.safetensors, even if the other half is missing."""
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder")
    names = sorted({path.stem for path in folder.iterdir() if path.suffix in (".json", ".safetensors")})
    if not names:
        raise FolderError(f"{folder} holds no case: a case is a pair NAME.json and NAME.safetensors")
    return names


def read_case(folder: Path, name: str) -> Case:
    """Read both halves of a case."""
    description, tensors = folder / f"{name}.json", folder / f"{name}.safetensors"
    for path in (description, tensors):
        if not path.is_file():
            raise CaseError(f"{path.name} is missing")
    try:
        facts = json.loads(description.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CaseError(f"{description.name} is not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise CaseError(f"{description.name} holds a {type(facts).__name__}; a case's description is an object")
    try:
        return Case(name, folder, facts, load_file(tensors))
    except (OSError, SafetensorError) as error:
        raise CaseError(f"{tensors.name} cannot be read: {error}") from None
