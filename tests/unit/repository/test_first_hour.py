"""The transcript of the README does what stands there, in order, where nothing is, and stops where something fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from first_hour import commands, follow, main, page

README = Path(__file__).resolve().parents[3] / "README.md"
TINY = """
## Two commands
```bash
git clone ADDRESS scldm && cd scldm   # ADDRESS: of this
export SEEN=yes
```
## What just happened
```bash
echo $SEEN $(ls -A $HOME | wc -l) $VIRTUAL_ENV $(basename $PWD)
```
## Your own cells
```bash
ls cells.h5ad        # your own
```
```python
print("no command")
```
## Compare runs
```bash
false
echo never
```
"""


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text(TINY)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    return folder


def test_the_readme_begins_with_a_clone_and_a_demo_and_activates_before_it_calls_the_program():
    found = [command for _, command in commands(README.read_text())]
    assert found[:2] == ["git clone ADDRESS scldm && cd scldm", "make demo"]
    first = next(i for i, command in enumerate(found) if command.startswith("scldm"))
    assert "source .venv/bin/activate" in found[:first]
    assert any("jobs/mine.yaml" in command for command in found)


def test_a_readme_without_a_section_is_refused():
    with pytest.raises(ValueError, match="no section 'Your own cells'; there are: Two commands, What just happened"):
        list(commands(TINY.partition("## Your own")[0]))


def test_commands_follow_one_another_in_an_empty_home_until_one_fails(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", "/somewhere")
    cells, empty = tmp_path / "mine.h5ad", tmp_path / "empty"
    cells.write_text("cells")
    empty.mkdir()
    done = list(follow(repository, empty, cells=cells, skip=None))
    assert [d.code for d in done] == [0, 0, 0, 0, 1]
    assert done[2].output == "yes 0 scldm\n"
    assert "cells.h5ad" in done[3].output
    assert "echo never" not in page(done, "about")


def test_what_is_skipped_is_said_and_the_exit_code_is_that_of_the_failure(repository, tmp_path, monkeypatch):
    out = tmp_path / "transcript.md"
    monkeypatch.setattr("sys.argv", ["first_hour.py", str(repository), "--skip", "cells", "--out", str(out)])
    assert main() == 1
    assert "| Your own cells | `ls cells.h5ad` | not run | – |" in out.read_text()
