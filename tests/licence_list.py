"""The licence of every pinned package, as its metadata or its LICENSE file says: docs/licences.md.

python tests/licence_list.py docs/licences.md        after a change of constraints.txt, with all extras installed
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
SAID_ELSEWHERE = {  # metadata says less, or more than what is installed
    "atheris": "Apache 2.0, in its LICENSE file",
    "docutils": "public domain and BSD; its one GPL file, for Emacs, is not in the wheel",
    "huey": "MIT, in its LICENSE file",
    "skops": "MIT, in its LICENSE file",
}
HEAD = """# Licences of what is installed

Every package that `constraints.txt` pins, with what it says of its licence. None forbids commercial use
(`tests/contracts/test_licences.py`). Written by `python tests/licence_list.py docs/licences.md`.

| package | version | licence |
|---|---|---|
"""
LONGEST = 90


def pinned() -> dict[str, str]:
    """Name -> version."""
    found = {}
    for line in PINS.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)", line):
            found[match[1]] = match[2]
    return found


def licence(name: str) -> str | None:
    """What a distribution's metadata says; None where it is not installed here."""
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    said = [c for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    said += [found.get("License-Expression"), found.get("License")]  # the last one may be a whole text
    return "; ".join(s for s in said if s)[:2000]


def short(name: str) -> str | None:
    """A line of a table."""
    said = licence(name)
    if said is None or name in SAID_ELSEWHERE:
        return SAID_ELSEWHERE.get(name)
    parts = [p.removeprefix("License :: ").removeprefix("OSI Approved :: ").strip() for p in said.split("; ")]
    whole = next((p.splitlines()[0] for p in parts if p and p != "OSI Approved"), "")
    return whole[:LONGEST].replace("|", "/")


def main(page: str) -> None:
    rows, missing = [], []
    for name, version in sorted(pinned().items(), key=lambda x: x[0].lower()):
        said = short(name)
        missing += [name] if said is None else []
        rows.append(f"| {name} | {version} | {said or '?'} |")
    Path(page).write_text(HEAD + "\n".join(rows) + "\n")
    if missing:
        print(f"not installed here, so not known: {', '.join(missing)}")


if __name__ == "__main__":
    main(sys.argv[1])
