"""Row C11: whatever reads a file gets every malicious file there is: an error of ours, and nothing of it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.files.malicious_files import malicious
from helpers.models.small_models import write_flow, write_vae
from safetensors import SafetensorError
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.context import StageContext
from pipeline.config.deepspeed import read_options
from pipeline.config.io.loader import load_job
from pipeline.config.job import HeldOutConfig, IngestConfig
from pipeline.core.manifest import read_manifest
from pipeline.data.ingest.genes import read_vocabulary
from pipeline.data.ingest.held_out import read_combinations
from pipeline.data.inspection.examine import Question, examine
from pipeline.inference.request import read_conditions
from pipeline.stages import ingest
from pipeline.training.checkpoints import manifest as checkpoint
from scldm.cells.cells import CellShardsError, open_cells
from scldm.checkpoints.native import load_flow, load_vae
from scldm.checkpoints.untrusted import child as untrusted_child
from scldm.checkpoints.untrusted.reader import UntrustedFileError, read_checkpoint, read_pickle
from scldm.checkpoints.upstream.yaml import UpstreamYaml
from scldm.data.vocabulary import Vocabulary
from scldm.errors import CheckpointError, InputError

OURS = (InputError, CheckpointError, CellShardsError, untrusted_child.rules.Refused)
# What a loader of a model reads first is the folder's other files: these are whole.
MODELS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], tuple[str, ...]]] = {
    "vae": (write_vae, load_vae, ("model.safetensors", "config.json", "vocabulary.json", "library_size.json")),
    "flow": (write_flow, load_flow, ("model.safetensors", "config.json")),
}


class Given:
    """A file of a stranger, under any name."""

    def __init__(self, folder: Path, data: bytes):
        self.folder, self.data = folder, data

    def under(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        return path


def cells(given: Given, source: dict[str, Any]) -> None:
    (given.folder / "stage").mkdir(exist_ok=True)
    context = StageContext(given.folder / "stage", {}, 0, SimpleNamespace(), None)
    ingest.run(IngestConfig.model_validate({"source": source}), context)


def looked_at(given: Given, path: Path) -> None:
    [found] = examine(Question(str(path), labels=("cell_type",)))
    if not found.errors:
        raise AssertionError("called usable")
    raise InputError(found.text())


def tenx_texts(given: Given) -> Path:
    given.under("tenx/features.tsv").write_text("ENSG00000000001\tA\n")
    given.under("tenx/barcodes.tsv").write_text("AAAC-1\n")
    return given.under("tenx/matrix.mtx").parent


def held_out(given: Given, name: str) -> None:
    read_combinations(HeldOutConfig.model_validate({"table": str(given.under(name))}))


def checkpoint_of_a_run(given: Given) -> None:
    """The manifest is the file: it verifies nothing, so the checkpoint is none."""
    found, rejected = checkpoint.newest(given.under("run/step-00000010-w1-aa/MANIFEST.json").parents[1])
    assert found is None
    raise InputError(rejected[0])


def shard_of_a_run(given: Given) -> None:
    """The manifest is whole and describes the file: what reads it then must not unpickle."""
    from pipeline.training.engine.state_files import Shards

    try:
        Shards(given.under("state-00000-of-00001.safetensors").parent)
    except SafetensorError as error:
        raise InputError(str(error)) from error


def upstream_configuration(given: Given) -> None:
    config = UpstreamYaml(given.under("config.yaml"))
    config.value("model.d_model", int)
    config.raise_problems()


def shards_of_cells(given: Given) -> None:
    given.under("cells/part-00000.h5ad")
    given.under("cells/manifest.json")
    open_cells(given.folder / "cells")


LOADERS: dict[str, Callable[[Given], Any]] = {
    "job file": lambda g: load_job(g.under("job.yaml")),
    "upstream's configuration": lambda g: upstream_configuration(g),
    "options of DeepSpeed": lambda g: read_options(str(g.under("ds.json"))),
    "h5ad: validate-data": lambda g: looked_at(g, g.under("a.h5ad")),
    "h5ad: ingest": lambda g: cells(g, {"type": "h5ad", "path": str(g.under("a.h5ad"))}),
    "10x file: validate-data": lambda g: looked_at(g, g.under("a.h5")),
    "10x file: ingest": lambda g: cells(g, {"type": "10x", "path": str(g.under("a.h5"))}),
    "10x texts: ingest": lambda g: cells(g, {"type": "10x", "path": str(tenx_texts(g))}),
    "vocabulary": lambda g: read_vocabulary(str(g.under("genes.json"))),
    "held-out parquet": lambda g: held_out(g, "held.parquet"),
    "held-out csv": lambda g: held_out(g, "held.csv"),
    "conditions parquet": lambda g: read_conditions(g.under("conditions.parquet")),
    "manifest of a stage": lambda g: read_manifest(g.under("manifest.json").parent),
    "manifest of a checkpoint": checkpoint_of_a_run,
    "shard of a checkpoint": shard_of_a_run,
    "generated cells": shards_of_cells,
    "upstream's checkpoint": lambda g: untrusted_child.read_checkpoint(
        str(g.under("model.ckpt")), str(g.folder), *torch_and_writer()
    ),
    "size factors": lambda g: untrusted_child.read_plain(str(g.under("sizes.pkl")), str(g.folder)),
}
# In the child process any exception is turned into a refusal: see `untrusted_child.main`.
OF_THE_CHILD = {"upstream's checkpoint", "size factors"}


AS_TEXT = {"held-out csv"}  # pickles of protocol 0 are text, and a table of text may hold any


def torch_and_writer() -> tuple[Any, Any]:
    import torch
    from safetensors.torch import save_file

    return torch, save_file


@pytest.mark.row("C11")
@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_refuses_every_malicious_file_and_runs_none(loader, tmp_path):
    canary = tmp_path / "canary"
    for i, (name, data) in enumerate(malicious(canary).items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        refused: Exception | None = None
        try:
            LOADERS[loader](Given(folder, data))
        except Exception as error:
            refused = error
        assert not canary.exists(), name
        expected = Exception if loader in OF_THE_CHILD else OURS
        assert isinstance(refused, expected) or (refused is None and loader in AS_TEXT), (name, refused)
        assert not isinstance(refused, (AssertionError, MemoryError, RecursionError)), name


@pytest.mark.row("C11")
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_folder_with_a_malicious_file_is_refused(kind, tmp_path):
    write, load, files = MODELS[kind]
    write(tmp_path / "sound")
    load(tmp_path / "sound")
    canary = tmp_path / "canary"
    for name, data in malicious(canary).items():
        for file in files:
            folder = tmp_path / "model"
            shutil.copytree(tmp_path / "sound", folder)
            (folder / file).write_bytes(data)
            with pytest.raises(CheckpointError, match=str(folder)):
                load(folder)
            shutil.rmtree(folder)
            assert not canary.exists(), (name, file)


@pytest.mark.row("C11")
def test_the_commands_end_with_2_and_say_what_was_asked_for(tmp_path):
    """The whole way, with the child process: the message names the file, what it wanted, and that nothing ran."""
    canary = tmp_path / "canary"
    files = malicious(canary)
    (tmp_path / "config.yaml").write_text("a: 1\n")
    for name, asked in (("torch: zip", "posix.system"), ("dill", "dill._dill._create_function")):
        (tmp_path / "model.ckpt").write_bytes(files[name])
        command = ["convert", "model.ckpt", "--config", "config.yaml", "--out", "out"]
        done = CliRunner().invoke(app, [c if "." not in c else str(tmp_path / c) for c in command])
        assert done.exit_code == 2, done.output
        assert not (tmp_path / "out").exists()
        with pytest.raises(
            UntrustedFileError, match=r"model.ckpt was not read: .*nothing was run|cannot be read"
        ) as said:
            read_checkpoint(tmp_path / "model.ckpt")
        assert asked in str(said.value) or "cannot be read" in str(said.value)
    (tmp_path / "sizes.pkl").write_bytes(files["BUILD"])
    with pytest.raises(UntrustedFileError, match=r"asks for __main__|asks for malicious_files|posix.system"):
        read_pickle(tmp_path / "sizes.pkl")
    assert not canary.exists()


@pytest.mark.row("S4")
@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "x" * 300, "$(touch canary)", "a;b", "..", ""])
def test_a_name_that_is_no_name_never_becomes_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = {"kind": "ingest", "name": name, "source": {"type": "synthetic"}}
    Path("job.yaml").write_text(json.dumps(job))
    done = CliRunner().invoke(app, ["run", "job.yaml"])
    assert done.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]


@pytest.mark.row("S4")
def test_paths_in_manifests_stay_inside_their_folder(tmp_path):
    """A folder of generated cells of a stranger: its manifest names a file elsewhere."""
    for place in ("../../secret", "/etc/passwd"):
        facts = {"cells": place, "n_cells": 1, "shards": place, "index": place}
        about = {"stage": "generate", "version": "v", "folder": "f", "config": {}, "inputs": {}, "facts": facts}
        (tmp_path / "manifest.json").write_text(json.dumps({**about, "seconds": 0, "finished_at": 0}))
        with pytest.raises(CellShardsError):
            open_cells(tmp_path)


@pytest.mark.row("S4")
def test_a_vocabulary_of_odd_names_is_text_and_no_path(tmp_path):
    names = ("../../x", "/abs", "$(touch canary)", "x" * 300, "<script>alert(1)</script>")
    Vocabulary(names, names, ()).save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json").feature_ids == names
    assert [p.name for p in tmp_path.iterdir()] == ["vocabulary.json"]
