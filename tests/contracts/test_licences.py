"""Every pinned dependency may be used by an institute with partners in industry, and its licence is known."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
from licence_list import ROOT, SAID_ELSEWHERE, licence, pinned, short

PAGE = ROOT / "docs" / "licences.md"
BSD_TEXT = r"Redistribution\s+and\s+use\s+in\s+source\s+and\s+binary\s+forms"
ALLOWED = re.compile(rf"MIT|BSD|Apache|PSF|Python Software|ISC|MPL|Mozilla Public|{BSD_TEXT}")
ONLY_WITH = {"igraph": "clusters"}  # GPL: package -> the extra that brings it, for scanpy's leiden in a notebook
FORBIDDEN = re.compile(r"\bA?GPL|non-?commercial|CC.BY.NC", re.IGNORECASE)


def test_docutils_brings_no_file_of_its_gpl_part():
    if licence("docutils") is None:
        pytest.skip("docutils comes with the docs extra, which is not installed here")
    files = importlib.metadata.files("docutils")
    assert files
    assert [str(f) for f in files if f.suffix == ".el" or "emacs" in f.parts] == []


def test_what_is_under_the_gpl_comes_with_an_extra_of_its_own_and_is_imported_nowhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in ONLY_WITH.items():
        brings = [name for name, packages in extras.items() if any(p.startswith(package) for p in packages)]
        assert brings == [extra]
        assert not any(p.startswith(package) for p in project["dependencies"])
        assert [name for name, packages in extras.items() if any(extra in p.split("]")[0] for p in packages)] == ["dev"]
        sources = [*(ROOT / "scldm").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]
        assert not [str(p) for p in sources if re.search(rf"^\s*(import|from) {package}\b", p.read_text(), re.M)]


@pytest.mark.row("S8")
def test_no_dependency_forbids_commercial_use_or_says_nothing():
    said = {name: licence(name) for name in pinned()}
    found = {name: text for name, text in said.items() if text is not None and name not in SAID_ELSEWHERE}
    assert len(found) > 100, "the pinned packages are not installed here"
    found = {name: text for name, text in found.items() if name not in ONLY_WITH}
    unknown = {name: text[:200] for name, text in found.items() if not ALLOWED.search(text)}
    forbidden = {name: text[:200] for name, text in found.items() if FORBIDDEN.search(text)}
    assert not unknown
    assert not forbidden


@pytest.mark.row("S8")
def test_the_page_lists_every_pin_and_what_it_says():
    rows = {
        name: (version, said)
        for name, version, said in re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", PAGE.read_text(), re.M)
    }
    again = "run: python tests/licence_list.py docs/licences.md, with all extras installed"
    assert {name: version for name, (version, _) in rows.items() if name != "package"} == pinned(), again
    said = {name: short(name) for name in pinned()}
    assert {name: text for name, text in said.items() if text is not None and rows[name][1] != text} == {}, again
    assert not [name for name, (_, text) in rows.items() if text == "?"]
