"""Generation is killed at every point of a shard's commit, its shards are damaged, two jobs want one output: the same
command again makes exactly the cells asked for, with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import anndata
import psutil
import pytest
from helpers.servers.recovery import Recoveries
from helpers.stages.generation_case import REFUSED, generate, hashes, run_in_process, write_inputs

import scldm
from pipeline.config.job import ResourcesConfig
from pipeline.core.fault_points import POINTS
from pipeline.core.faults import VARIABLE
from pipeline.stages.generate import ray_pool
from scldm.cells.cells import CellShardsError
from scldm.errors import InputError

pytestmark = pytest.mark.chaos
KILLED = -signal.SIGKILL
ASKED = {"cells": [{"cell_type": "T", "n_cells": 70}, {"donor": "d1", "n_cells": 50}], "shard_size": 30, "seed": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Hashes of the shards of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    generate(folder, inputs, **ASKED)
    found = hashes(folder)
    assert len(found) == 4
    return found


def ends(process, timeout: float = 120) -> int:
    process.join(timeout)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def doubled_and_missing(folder: Path) -> dict[str, int]:
    """Of the cells asked for, by their ids; for a record."""
    shards = sorted((folder / "cells").glob("part-*.h5ad"))
    ids = [i for shard in shards for i in anndata.read_h5ad(shard).obs["gen_index"].tolist()]
    asked = sum(row["n_cells"] for row in ASKED["cells"])
    assert sorted(ids) == list(range(asked))
    return {"duplicates": len(ids) - len(set(ids)), "missing": asked - len(set(ids))}


KILLS = [
    "record.before_rename:n=1:kill",
    "generate.after_batch:n=3:kill",  # in the middle of the second shard
    "generate.before_rename:n=2:kill",
    "generate.before_record:n=2:kill",
    "generate.after_record:n=4:kill",
    "record.before_rename:n=5:kill",  # the manifest
    "generate.before_manifest:kill",
]


def test_every_point_of_generation_is_among_the_kills():
    assert {k.split(":")[0] for k in KILLS} >= {p for p in POINTS if p.startswith("generate.")}


@pytest.mark.row("G2", "G4")
def test_killed_at_any_point_the_same_command_gives_the_same_bytes(inputs, whole, tmp_path, record):
    """Each kill in an output of its own; then all of them in one."""
    for i, fault in enumerate(KILLS):
        folder = tmp_path / f"kill{i}"
        assert ends(run_in_process(folder, inputs, fault, **ASKED)) == KILLED, fault
        assert not (folder / "manifest.json").exists()
        with pytest.raises(CellShardsError):  # whoever reads meanwhile
            scldm.open_cells(folder)
        assert ends(run_in_process(folder, inputs, **ASKED)) == 0, fault
        assert hashes(folder) == whole, fault
        left = [p.name for p in (folder / "cells").iterdir() if p.name.startswith(".")]
        assert not left, f"{fault} leaves {left}"
    many = tmp_path / "many"
    for fault in KILLS:  # any number of kills
        ends(run_in_process(many, inputs, fault.replace("n=2", "n=1").replace("n=4", "n=1"), **ASKED))
    assert ends(run_in_process(many, inputs, **ASKED)) == 0
    assert hashes(many) == whole
    record |= {"kills": len(KILLS), **doubled_and_missing(many)}


@pytest.mark.row("G6")
def test_only_damaged_and_lost_shards_are_made_again(inputs, whole, tmp_path):
    folder = tmp_path / "damaged"
    generate(folder, inputs, **ASKED)
    cells = folder / "cells"
    (folder / "manifest.json").unlink()
    (cells / "part-00000.h5ad").unlink()
    bytes_ = bytearray((cells / "part-00001.h5ad").read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    (cells / "part-00001.h5ad").write_bytes(bytes_)
    (cells / "part-00002.h5ad.json").write_text("{")
    kept = (cells / "part-00003.h5ad").stat().st_mtime_ns
    generate(folder, inputs, **ASKED)
    assert hashes(folder) == whole
    assert (cells / "part-00003.h5ad").stat().st_mtime_ns == kept


@pytest.mark.row("G5")
def test_G5_on_a_full_disk_no_shard_is_half_there_and_the_same_command_goes_on(inputs, whole, small_disk):
    folder = small_disk / "full"
    folder.mkdir()
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize - (96 << 10)))  # room for a shard or so
    assert ends(run_in_process(folder, inputs, **ASKED)) not in (0, KILLED, REFUSED)
    assert not (folder / "manifest.json").exists()
    shards = list((folder / "cells").glob("part-*.h5ad"))
    assert len(shards) < 4
    for shard in shards:
        assert hashlib.sha256(shard.read_bytes()).hexdigest() == whole[f"cells/{shard.name}"]
    filler.unlink()
    assert ends(run_in_process(folder, inputs, **ASKED)) == 0
    assert hashes(folder) == whole


@pytest.mark.row("T13")
def test_two_jobs_on_one_output_are_refused(inputs, whole, tmp_path):
    folder = tmp_path / "shared"
    first = run_in_process(folder, inputs, "generate.before_record:sleep=60", **ASKED)
    while not (folder / "cells" / "part-00000.h5ad").is_file():
        time.sleep(0.01)
    assert ends(run_in_process(folder, inputs, **ASKED)) == REFUSED
    said = (tmp_path / "shared.refused").read_text()
    assert f"is being written by process {first.pid}" in said
    first.kill()
    assert ends(first) == KILLED
    assert ends(run_in_process(folder, inputs, **ASKED)) == 0  # a lock whose owner is gone holds nobody up
    assert hashes(folder) == whole


def test_wrong_labels_are_refused_all_at_once_and_leave_no_shard(inputs, tmp_path):
    wrong = [{"cell_type": "NKK", "n_cells": 1}, {"cell_type": "B", "tissue": "lung", "n_cells": -1}]
    with pytest.raises(InputError) as error:
        generate(tmp_path / "wrong", inputs, cells=wrong, genes=["g1", "g99"])
    for said in ("no class 'NKK' (did you mean 'NK'?)", "knows no label 'tissue'", "n_cells must be", "no gene 'g99'"):
        assert said in str(error.value)
    assert not (tmp_path / "wrong" / "cells").exists()


def test_a_quarter_of_a_million_cells_and_one_more(inputs, tmp_path):
    facts = generate(
        tmp_path / "many", inputs, n_cells=250_001, shard_size=250_000, sampler={"solver": "euler", "steps": 1}
    )
    assert [s["n_cells"] for s in facts["shards"]] == [250_000, 1]
    last = anndata.read_h5ad(tmp_path / "many" / facts["shards"][1]["file"])
    assert last.obs["gen_index"].tolist() == [250_000]


def kill_an_actor(cells: Path, killed: list[int], recoveries: Recoveries) -> None:
    """SIGKILL to an actor that is in the middle of a shard: its file is there, under its temporary name."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for tmp in cells.glob(".part-*.tmp"):
            pid = int(tmp.name.split(".")[-2])
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                shard = cells / f"{tmp.name.removeprefix('.').partition('.h5ad')[0]}.h5ad"
                recoveries.shard("actor of a generation, to the shard that it was making", shard)
                return
        time.sleep(0.01)


@pytest.mark.row("G1")
def test_a_killed_actor_costs_nothing_but_time(inputs, whole, tmp_path, ray_cluster, monkeypatch, record):
    """Under Ray, with two actors that each wait a moment in every shard."""
    monkeypatch.setenv(VARIABLE, "generate.after_batch:n=1:sleep=1")
    folder, killed, recoveries = tmp_path / "ray", [], Recoveries()
    killer = threading.Thread(target=kill_an_actor, args=(folder / "cells", killed, recoveries), daemon=True)
    killer.start()

    def two_actors(todo, spec, context):
        context.resources = ResourcesConfig(cpus_per_worker=1, actors={"min": 1, "max": 2})
        return ray_pool(todo, spec, context)

    facts = generate(folder, inputs, pool=two_actors, **ASKED)
    killer.join(timeout=5)
    assert killed, "no actor was found to kill"
    assert recoveries.seconds, "the shard of the killed actor has no record"
    assert facts["n_cells"] == 120
    assert hashes(folder) == whole
    attempts = [json.loads(p.read_text()) for p in (folder / "cells").glob(".shard-*.attempts")]
    assert not attempts
    record |= {"kills": 1, "recover": recoveries.seconds, **doubled_and_missing(folder)}
