"""A stage runs again when the content of its input has changed, says what, and not when the same content has moved."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.config.io.loader import load_job
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.data.soma.write import write_experiment
from pipeline.workflow.changes import versions_of_0_1
from pipeline.workflow.schedule import Step, resolve
from scldm.errors import InputError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("samples").mkdir()
    for name in "ab":
        write_h5ad(f"samples/{name}.h5ad", seed=ord(name))
    tenx = Path("ranger")
    tenx.mkdir()
    for name in ("matrix.mtx", "barcodes.tsv", "features.tsv"):
        (tenx / name).write_text(name)
    write_soma("soma", seed=1)


def counts(seed: int) -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(seed).poisson(1.0, (30, 5)).astype(np.float32))


def write_h5ad(path: str, *, seed: int) -> None:
    anndata.AnnData(counts(seed)).write_h5ad(path)


def write_soma(path: str, *, seed: int) -> None:
    obs = pd.DataFrame({"obs_id": [f"c{i}" for i in range(30)]})
    genes = [f"G{i}" for i in range(5)]
    var = pd.DataFrame({"feature_id": genes, "feature_name": genes, "feature_length": 0})
    write_experiment(Path(path).absolute(), obs, var, [counts(seed)])


def steps(source: str) -> list[Step]:
    Path("job.yaml").write_text(f"kind: pipeline\nname: demo\ningest:\n  source: {source}\ngenerate: {{n_cells: 5}}\n")
    return list(resolve(load_job("job.yaml", []), "job.yaml").steps)


def finish(source: str) -> list[Step]:
    """Pretend that all stages of a job have run."""
    for step in (found := steps(source)):
        write_done(step, step.version, {k: dict(c.files) for k, c in step.contents.items()})
    return found


def write_done(step: Step, version: str, contents: dict, *, seconds: float = 1.0) -> Manifest:
    folder = step.folder.parent / version
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: m.version for name, m in step.inputs.items()}
    config = step.config.model_dump(mode="json")
    manifest = Manifest(step.stage, version, str(folder), config, inputs, {}, seconds, time.time(), {}, contents)
    write_manifest(manifest)
    return manifest


def will_run(source: str) -> tuple[int, str]:
    """How many stages will run, and why the first does."""
    todo = [s for s in steps(source) if s.done is None]
    return len(todo), todo[0].reason if todo else ""


def rewrite_in_place(path: str) -> None:
    """Change bytes at the end of a file, and nothing about its size."""
    size, data = os.path.getsize(path), bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    with Path(path).open("r+b") as f:
        f.write(data)
    assert os.path.getsize(path) == size


GLOB, ONE, FOLDER = ("{type: h5ad, path: %s}" % p for p in ("'samples/*.h5ad'", "samples/a.h5ad", "samples"))  # noqa: UP031
TENX, SOMA = "{type: 10x, path: ranger}", "{type: soma, uri: soma}"


@pytest.mark.parametrize("source", [GLOB, ONE, FOLDER, TENX, SOMA])
def test_nothing_runs_while_the_input_is_the_same(source):
    finish(source)
    for path in [*Path("samples").iterdir(), *Path("ranger").iterdir(), *Path("soma/obs").rglob("*")]:
        path.touch()
    assert will_run(source) == (0, "")


@pytest.mark.parametrize("source", [GLOB, FOLDER])
def test_a_file_that_is_added_replaced_or_removed_reruns_all_stages_and_is_named(source):
    n = len(finish(source))
    write_h5ad("samples/c.h5ad", seed=3)
    assert will_run(source) == (n, "source.path has other content: added c.h5ad")
    Path("samples/c.h5ad").replace("samples/b.h5ad")
    assert will_run(source) == (n, "source.path has other content: changed b.h5ad")
    Path("samples/b.h5ad").unlink()
    assert will_run(source) == (n, "source.path has other content: removed b.h5ad")


@pytest.mark.parametrize(
    ("source", "path"),
    [(ONE, "samples/a.h5ad"), (GLOB, "samples/b.h5ad"), (TENX, "ranger/barcodes.tsv"), (TENX, "ranger/matrix.mtx")],
)
def test_content_rewritten_in_place_at_the_same_size_is_seen(source, path):
    n = len(finish(source))
    rewrite_in_place(path)
    assert will_run(source) == (n, f"source.path has other content: changed {Path(path).name}")


def test_the_earlier_results_are_used_again_when_the_earlier_content_is_back():
    finish(GLOB)
    shutil.copy("samples/a.h5ad", "kept.h5ad")
    rewrite_in_place("samples/a.h5ad")
    assert will_run(GLOB)[0] > 0
    Path("kept.h5ad").replace("samples/a.h5ad")
    assert will_run(GLOB) == (0, "")


@pytest.mark.parametrize(
    ("source", "folder", "elsewhere"),
    [
        (GLOB, "samples", "{type: h5ad, path: 'copy/*.h5ad'}"),
        (ONE, "samples", "{type: h5ad, path: copy/a.h5ad}"),
        (TENX, "ranger", "{type: 10x, path: copy}"),
        (SOMA, "soma", "{type: soma, uri: copy}"),
    ],
)
def test_a_copy_at_another_place_is_the_same_input(source, folder, elsewhere):
    finish(source)
    shutil.copytree(folder, "copy")
    assert will_run(elsewhere) == (0, "")


def test_the_name_of_a_sample_counts_if_a_label_is_taken_from_it():
    source = "{type: 10x, path: %s}, labels: [dataset_id]"  # the sample's name becomes dataset_id
    finish(f"{source % 'ranger'}".replace(", labels", "\n  labels"))
    shutil.copytree("ranger", "copy")
    runs, why = will_run(f"{source % 'copy'}".replace(", labels", "\n  labels"))
    assert runs > 0
    assert why == "setting changed: source.path ranger -> copy"


def test_an_experiment_that_was_written_again_is_another_input():
    n = len(finish(SOMA))
    shutil.rmtree("soma")
    write_soma("soma", seed=2)
    runs, why = will_run(SOMA)
    assert runs == n
    assert why.startswith("source.uri has other content: changed obs")
    assert "ms/RNA/X/raw" in why


def test_counts_of_a_measurement_that_is_found_because_it_is_the_only_one_are_part_of_the_input():
    write_soma("other", seed=1)
    Path("other/ms/RNA").rename("other/ms/rna")
    Path("other/ms/rna/X/raw").rename("other/ms/rna/X/data")
    source = "{type: soma, uri: other}"
    n = len(finish(source))
    assert will_run(source) == (0, "")
    write_soma("again", seed=2)
    shutil.rmtree("other/ms/rna/X/data")
    shutil.copytree("again/ms/RNA/X/raw", "other/ms/rna/X/data")
    runs, why = will_run(source)
    assert runs == n
    assert why == "source.uri has other content: changed ms/rna/X/data"


def test_a_later_job_refuses_an_experiment_that_is_not_what_ingest_read():
    finish(SOMA)
    Path("vae.yaml").write_text("kind: train_vae\nname: demo\ntrain: {max_steps: 7}\n")
    assert [s.done for s in resolve(load_job("vae.yaml", []), "vae.yaml").steps] == [None]
    shutil.rmtree("soma")
    write_soma("soma", seed=2)
    with pytest.raises(InputError, match=r"the experiment soma is not what ingest \w+ read .*run ingest again"):
        resolve(load_job("vae.yaml", []), "vae.yaml")


def test_a_later_job_refuses_old_cells_that_are_not_what_ingest_read():
    write_soma("old", seed=3)
    finish(f"{ONE}\n  replay: {{source: {{type: soma, uri: old}}}}")
    Path("vae.yaml").write_text("kind: train_vae\nname: demo\ntrain: {max_steps: 7}\n")
    assert [s.done for s in resolve(load_job("vae.yaml", []), "vae.yaml").steps] == [None]
    shutil.rmtree("old")
    write_soma("old", seed=4)
    with pytest.raises(InputError, match=r"the experiment old is not what ingest \w+ read .*run ingest again"):
        resolve(load_job("vae.yaml", []), "vae.yaml")


def test_another_part_of_an_experiment_is_not_the_input():
    finish(SOMA)
    shutil.copytree("soma/ms/RNA/X/raw", "soma/ms/RNA/X/normalised")
    assert will_run(SOMA) == (0, "")


def test_a_path_that_does_not_exist_is_refused_before_anything_starts():
    for source in ("{type: 10x, path: nowhere}", "{type: soma, uri: nowhere}", "{type: h5ad, path: nowhere.h5ad}"):
        with pytest.raises(InputError, match="no such file"):
            steps(source)


# ---- results of version 0.1 --------------------------------------------------------------------------------------
def finish_as_0_1(source: str, *, seconds: float, tilde: bool = False) -> str:
    """Pretend that version 0.1 has run ingest; it took `seconds`."""
    step = steps(source)[0]
    version = versions_of_0_1("ingest", step.config, {}, 0, step.contents)[-1 if tilde else 0]
    write_done(step, version, {}, seconds=seconds)
    return version


@pytest.mark.parametrize("source", [GLOB, ONE, TENX, SOMA])
def test_a_result_of_0_1_is_kept_if_nothing_has_changed_since_it_began(source):
    time.sleep(0.05)
    version = finish_as_0_1(source, seconds=0.01)
    assert steps(source)[0].version == version
    assert steps(source)[0].done is not None


@pytest.mark.parametrize("source", [GLOB, ONE, TENX, SOMA])
def test_a_result_of_0_1_is_made_again_if_its_input_may_have_changed(source):
    finish_as_0_1(source, seconds=1000)  # began before the input was written
    runs, why = will_run(source)
    assert runs > 0
    assert "version 0.1 did not record the content" in why


def test_a_result_of_0_1_whose_input_was_recorded_later_is_compared_by_content():
    time.sleep(0.05)
    version = finish_as_0_1(GLOB, seconds=0.01)
    step = steps(GLOB)[0]
    write_manifest(replace(step.done, contents={k: dict(c.files) for k, c in step.contents.items()}))
    Path("samples/a.h5ad").touch()
    assert steps(GLOB)[0].version == version
    rewrite_in_place("samples/a.h5ad")
    assert will_run(GLOB)[1] == "source.path has other content: changed a.h5ad"


def test_a_result_of_0_1_with_a_path_from_home_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    time.sleep(0.05)
    version = finish_as_0_1("{type: h5ad, path: ~/samples/a.h5ad}", seconds=0.01, tilde=True)
    assert steps("{type: h5ad, path: ~/samples/a.h5ad}")[0].version == version
