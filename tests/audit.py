"""Known holes of the pinned packages, by pip-audit: `make audit`.

Exit code 0: none are known, or the list of holes could not be reached, which is said; 1: there are some, or pip-audit
itself failed. A hole that does not concern us, or has no mend yet, stands in ACCEPTED with the reason and the day on
which it is looked at again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NO_NETWORK = ("ConnectionError", "Max retries exceeded", "timed out", "Failed to resolve", "ConnectTimeout",
              "ProxyError", "Could not connect", "Connection refused", "NewConnectionError")  # fmt: skip
ACCEPTED: dict[str, str] = {}  # id of a hole -> why it is accepted, and until when


def main(pins: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        listed, answer = Path(folder) / "requirements.txt", Path(folder) / "answer.json"
        listed.write_text("".join(f"{line}\n" for line in pinned(Path(pins))))
        ignored = [word for hole in ACCEPTED for word in ("--ignore-vuln", hole)]
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(listed), "--no-deps", "--disable-pip",
                   "--progress-spinner", "off", "--timeout", "15", "--format", "json", "--output", str(answer),
                   *ignored]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(answer.read_text())["dependencies"] if answer.is_file() and answer.stat().st_size else None
    code, text = verdict(found, (done.stderr.strip().splitlines() or ["no message"])[-1])
    print(text)
    return code


def verdict(found: list[dict[str, Any]] | None, last_line: str) -> tuple[int, str]:
    """Exit code and text.

    Args:
        found: What pip-audit says of each package; None if it came to no answer.
        last_line: Of its messages.
    """
    if found is None and not any(sign in last_line for sign in NO_NETWORK):
        return 1, f"pip-audit failed: {last_line[:300]}"
    if found is None:
        return 0, f"audit skipped: the list of known holes cannot be reached from here ({last_line[:200]})"
    asked = [x for x in found if "skip_reason" not in x]
    if not asked:
        return 0, f"audit skipped: what can be reached from here knows none of the {len(found)} packages"
    holes = [f"{x['name']} {x['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'nothing yet'}"
             for x in asked for hole in x["vulns"]]  # fmt: skip
    unknown = [x["name"] for x in found if "skip_reason" in x]
    more = [f"{len(unknown)} could not be looked up: {', '.join(unknown[:10])}"] if unknown else []
    words = f"{len(holes)} known holes in {len(asked)} packages"
    return int(bool(holes)), "\n".join([*holes, *more, words])


def pinned(path: Path) -> list[str]:
    """`name==version` of every pin, without markers, comments and options."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if "==" in line and not line.startswith("-")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
