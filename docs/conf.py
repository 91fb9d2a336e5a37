"""Sphinx: `make docs`. Warnings are errors, so a page that nobody links and a link that leads nowhere are found."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "scLDM at Census scale"
author = "the scLDM-at-Census-scale developers"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = (
    "off"  # pages show the outputs that are in the file; tests/unit/repository/test_notebook.py executes it
)
autodoc_typehints = "none"
autodoc_member_order = "bysource"
exclude_patterns = ["_build", "jupyter_execute"]  # the second is where myst-nb puts copies of notebooks
suppress_warnings = ["mystnb.unknown_mime_type"]
html_theme = "furo"
html_title = project
html_copy_source = False

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")


def name_files_of_the_repository(app: Any, page: str, text: list[str]) -> None:
    """Links from a page to a file outside docs/ work on a code host; here the file is named instead, if it is there."""

    def named(link: re.Match[str]) -> str:
        if not (ROOT / link[2]).exists():
            raise ValueError(f"docs/{page}.md links to {link[2]}, which is not in the repository")
        return f"{link[1]} (`{link[2]}`)" if link[2] not in link[1] else link[1]

    if "/" not in page:  # elsewhere ../ is a page of docs/
        text[0] = _OUTSIDE.sub(named, text[0])


def setup(app: Any) -> None:
    app.connect("source-read", name_files_of_the_repository)
