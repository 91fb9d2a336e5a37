"""Every pinned dependency may be used by an institute with partners in industry, and its licence is known."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
BSD_TEXT = r"Redistribution\s+and\s+use\s+in\s+source\s+and\s+binary\s+forms"
ALLOWED = re.compile(rf"MIT|BSD|Apache|PSF|Python Software|ISC|MPL|Mozilla Public|{BSD_TEXT}")
FORBIDDEN = re.compile(r"\bA?GPL|non-?commercial|CC.BY.NC", re.IGNORECASE)
SAID_ELSEWHERE = {  # metadata says less, or more than what is installed
    "atheris": "Apache 2.0, in its LICENSE file",
    "docutils": "public domain and BSD; its one GPL file, for Emacs, is not in the wheel",
    "huey": "MIT, in its LICENSE file",
    "skops": "MIT, in its LICENSE file",
}


def pinned() -> list[str]:
    lines = (line.strip() for line in PINS.read_text().splitlines())
    return [re.split(r"[=<>;\[ ]", line)[0] for line in lines if line and not line.startswith("#")]


def licence(name: str) -> str | None:
    """What a distribution's metadata says; None where it is not installed here."""
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    said = [c for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    said += [found.get("License-Expression"), found.get("License")]  # the last one may be a whole text
    return "; ".join(s for s in said if s)[:2000]


def test_docutils_brings_no_file_of_its_gpl_part():
    if licence("docutils") is None:
        pytest.skip("docutils comes with the docs extra, which is not installed here")
    files = importlib.metadata.files("docutils")
    assert files
    assert [str(f) for f in files if f.suffix == ".el" or "emacs" in f.parts] == []


@pytest.mark.row("S8")
def test_no_dependency_forbids_commercial_use_or_says_nothing():
    said = {name: licence(name) for name in pinned()}
    found = {name: text for name, text in said.items() if text is not None and name not in SAID_ELSEWHERE}
    assert len(found) > 100, "the pinned packages are not installed here"
    unknown = {name: text[:200] for name, text in found.items() if not ALLOWED.search(text)}
    forbidden = {name: text[:200] for name, text in found.items() if FORBIDDEN.search(text)}
    assert not unknown
    assert not forbidden
