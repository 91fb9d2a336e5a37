"""Row S3: YAML that wants to run something, to grow without end, or to be read in two ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.io.loader import load_job
from scldm.checkpoints.upstream.yaml import UpstreamYaml
from scldm.errors import CheckpointError, InputError

ROOT = Path(__file__).resolve().parents[3]
JOB = "kind: ingest\nname: demo\nsource: {type: synthetic}\n"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
LAUGHING_KEYS = "a0: &a0 {k0: x}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 12)
)
CANARY = "open('canary', 'w')"

HOSTILE: dict[str, tuple[bytes, str]] = {
    "an object": (f"{JOB}labels: !!python/object/apply:os.system [touch canary]\n".encode(), "yaml:4: column 9: tag"),
    "a new object": (f"{JOB}labels: !!python/object/new:os.system [touch canary]\n".encode(), "yaml:4: column 9: tag"),
    "a name": (f"{JOB}labels: !!python/name:os.system\n".encode(), "yaml:4: column 9: tag"),
    "a module": (f"{JOB}labels: !!python/module:canary\n".encode(), "yaml:4: column 9: tag"),
    "a tuple": (f"{JOB}labels: !!python/tuple [a]\n".encode(), "yaml:4: column 9: tag"),
    "a tag of its own": (f"{JOB}labels: !include /etc/passwd\n".encode(), "job.yaml:4: column 9: tag !include"),
    "a declared tag": (b"%TAG ! tag:yaml.org,2002:python/\n---\n" + f"{JOB}x: !name:os.system\n".encode(), "tag"),
    "binary": (f"{JOB}labels: !!binary aGk=\n".encode(), "job.yaml:4: labels"),
    "a target": (f"{JOB}_target_: os.system\n".encode(), "job.yaml:4: _target_: unknown key"),
    "a target below": (f"{JOB}split: {{_target_: os.system}}\n".encode(), "split._target_: unknown key"),
    "eval": (f'{JOB}labels: ["${{eval:{CANARY}}}"]\n'.encode(), "job.yaml:4"),
    "an environment variable": (f"{JOB}labels: ['${{oc.env:HOME}}']\n".encode(), "job.yaml:4"),
    "aliases of lists": (LAUGHS.encode(), "once aliases (*name) are followed"),
    "aliases of maps": (LAUGHING_KEYS.encode(), "once aliases (*name) are followed"),
    "an alias of itself": (b"a: &a\n  b: *a\n", "an alias (*name) that contains itself"),
    "an alias of nothing": (f"{JOB}labels: *nothing\n".encode(), "job.yaml:4: column 9"),
    "a merge key": (b"a: &a {kind: ingest}\n<<: *a\nname: x\n", "kind: missing"),
    "50 MB": (JOB.encode() + b"# " + b"x" * 50_000_000, "larger than 1,000,000 bytes"),
    "a long number": (f"{JOB}obs_filter: {'9' * 5000}\n".encode(), "job.yaml:4"),
    "many keys": (b"".join(b"k%d: 1\n" % i for i in range(60_000)), "more than 20,000 names and values"),
    "a key twice": (f"{JOB}name: other\n".encode(), "job.yaml:4: column 1: name is written twice, first on line 2"),
    "a key twice below": (f"{JOB}split: {{test: 0.1, test: 0.2}}\n".encode(), "split.test is written twice"),
    "deep lists": (f"{JOB}labels: {'[' * 5000}".encode(), "job.yaml:4: column 38: nested deeper than 30 levels"),
    "deep maps": (b"".join(b" " * i + b"a:\n" for i in range(300)), "nested deeper than 30 levels"),
    "deep dashes": (b"a:\n" + b"- " * 3000 + b"x\n", "nested deeper than 30 levels"),
    "a tab": (b"kind: ingest\nsource:\n\ttype: synthetic\n", "job.yaml:3: column 1: a tab"),
    "a mark of byte order": (b"\xef\xbb\xbf" + JOB.encode(), "job.yaml:1: starts with a byte-order mark"),
    "UTF-16": (JOB.encode("utf-16"), "is not UTF-8"),
    "latin 1": (f"{JOB}labels: [caf\xe9]\n".encode("latin-1"), "job.yaml:4: byte 0xe9 is not UTF-8"),
    "a null byte": (f"{JOB}labels: [a\0b]\n".encode(), "not YAML text"),
    "escape sequences": (f"{JOB}labels: [\x1b[2J]\n".encode(), "not YAML text"),
    "two documents": (f"{JOB}---\n{JOB}".encode(), "job.yaml:4: column 1"),
    "a list": (b"- kind: ingest\n", "this one is a list"),
    "a list as a key": (f"{JOB}? [a, b]\n: c\n".encode(), "job.yaml:4: column 3: a key must be a word"),
    "wrong kinds": (b"kind: [ingest]\nname: {a: 1}\nsource: 7\n", "kind"),
    "no end": (f"{JOB}labels: [a\n".encode(), "job.yaml:5: column 1"),
    "no end of a text": (f'{JOB}labels: ["a\n'.encode(), "job.yaml:5: column 1"),
}  # fmt: skip
CHILD = """
import json, sys, time
from pipeline.config.io.loader import load_job
from pipeline.core.manifest import InputError
said = {}
for path in sys.argv[1:]:
    began = time.process_time()
    try:
        load_job(path)
    except InputError as error:
        said[path] = (time.process_time() - began, str(error))
# Not ru_maxrss, which begins with the parent's.
[peak] = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps([said, peak]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a process of its own says of every file: seconds and message; and its largest memory in kB."""
    folder = tmp_path_factory.mktemp("yaml")
    paths = {}
    for i, (name, (content, _)) in enumerate(HOSTILE.items()):
        paths[name] = folder / str(i) / "job.yaml"
        paths[name].parent.mkdir()
        paths[name].write_bytes(content)
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, paths.values())], capture_output=True, text=True,
                          cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600, check=True)  # fmt: skip
    said, memory = json.loads(done.stdout)
    assert not list(folder.rglob("canary"))
    return {name: said.get(str(path)) for name, path in paths.items()}, memory


@pytest.mark.row("S3")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_job_file_is_refused_in_a_second_with_its_line(name, answers):
    assert answers[0][name] is not None, "it was accepted"
    seconds, message = answers[0][name]
    assert HOSTILE[name][1] in message
    assert all(c.isprintable() or c == "\n" for c in message)
    assert seconds < 1


@pytest.mark.row("S3")
def test_reading_them_all_takes_little_memory(answers):
    assert answers[1] < 200 << 10  # kB


@pytest.mark.row("S3")
@pytest.mark.parametrize("name", HOSTILE)
def test_upstreams_configuration_is_read_with_the_same_care(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_bytes(HOSTILE[name][0])

    def read() -> None:
        config = UpstreamYaml(path)
        config.value("model.d_model", int)
        config.raise_problems()

    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        read()
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.row("S3")
@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [touch canary]", "${eval:1}", "[" * 2000, "a: [b"])
def test_an_override_is_read_with_the_same_care(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    with pytest.raises(InputError, match=r"command line"):
        load_job("job.yaml", [f"obs_filter={value}"])
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]
