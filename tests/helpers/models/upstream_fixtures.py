"""Outputs recorded from upstream, if they are in the folder shared/ of this checkout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[3].parent / "shared" / "fixtures" / "upstream" / "visible"


@dataclass(frozen=True)
class Fixture:
    """One recorded case: its description and its tensors by key."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose key starts with the prefix, by the rest of their key."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def load_fixture(name: str) -> Fixture:
    """Read a case, or skip the test that asks for it."""
    if not FOLDER.is_dir():
        pytest.skip("upstream's recorded outputs are not beside this checkout (shared/fixtures/upstream/visible)")
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    return Fixture(facts, load_file(FOLDER / f"{name}.safetensors"))
