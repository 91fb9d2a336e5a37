"""A registered model gives the cells that `generate` gives, to the last count, wherever it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from helpers.stages.generation_case import generate, write_inputs
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.job import EvaluateJob
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.tracking import tracker as tracking
from pipeline.tracking.comparison.fetch import from_run
from pipeline.tracking.comparison.records import StageRecord
from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.provenance import read_ids
from pipeline.tracking.tracker import Tracking

pytestmark = pytest.mark.integration
CELLS = [{"cell_type": "B", "donor": "d_2", "n_cells": 3}, {"cell_type": None, "donor": "d1", "n_cells": 2}]
TABLE = pd.DataFrame(CELLS)
SEED = 7


@pytest.fixture(scope="module", autouse=True)
def patience():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "CLOSE_SECONDS", 120.0)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tracked pipeline `demo` with a VAE and a flow, and the cells that its models make."""
    root = tmp_path_factory.mktemp("root")
    made = write_inputs(root / "made")
    tracking = Tracking(EvaluateJob(kind="evaluate", name="demo"), root)
    inputs: dict[str, Manifest] = {}
    for stage, version in (("ingest", "i1"), ("train_vae", "v1"), ("train_flow", "f1")):
        folder = root / "demo" / stage / version
        folder.parent.mkdir(parents=True)
        Path(made[stage].folder).rename(folder)
        tracker = tracking.stage(stage, version, folder, {"train": {"max_steps": 3}}, inputs)
        given = {k: m.version for k, m in inputs.items()}
        inputs[stage] = Manifest(stage, version, str(folder), {}, given, made[stage].facts, 1.0, 1.0)
        write_manifest(inputs[stage])
        tracker.describe(inputs[stage])
        tracker.finish()
    tracking.close()
    generate(root / "cells", inputs, cells=CELLS, seed=SEED)
    return root


@pytest.fixture(scope="module")
def uri(root) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


def register(root: Path, *words: str):
    return CliRunner().invoke(app, ["mlflow", "register", str(root / "demo"), *words])


@pytest.fixture(scope="module")
def registered(root):
    return register(root, "--alias", "champion")


@pytest.fixture(scope="module")
def expected(root) -> np.ndarray:
    return anndata.read_h5ad(root / "cells" / "cells" / "part-00000.h5ad").X.toarray()


@pytest.fixture(scope="module")
def model(registered, uri):
    import mlflow

    mlflow.set_tracking_uri(uri)
    yield mlflow.pyfunc.load_model("models:/scldm-demo@champion")
    mlflow.set_tracking_uri(None)  # it is global, and in the environment too


def test_the_command_names_the_version_its_alias_and_its_run(registered, root):
    assert registered.exit_code == 0, registered.output
    run_id = read_ids(root / "demo" / "train_flow" / "f1")["run_id"]
    for said in ("models:/scldm-demo/1", "models:/scldm-demo@champion", run_id):
        assert said in registered.output


def test_prediction_is_what_generate_makes_with_that_seed(model, expected):
    counts = model.predict(TABLE, params={"seed": SEED})
    np.testing.assert_array_equal(counts.to_numpy(), expected)
    assert (model.predict(TABLE, params={"seed": SEED + 1}).to_numpy() != expected).any()


def test_a_table_without_n_cells_gives_a_cell_for_each_row(model):
    table = TABLE.drop(columns="n_cells")
    assert len(model.predict(table)) == len(table)


def test_a_class_that_the_model_does_not_know_is_refused_by_name(model):
    with pytest.raises(Exception, match="Martian"):
        model.predict(pd.DataFrame({"cell_type": ["Martian"], "n_cells": [1]}))


def test_a_table_of_counts_has_its_labels_in_the_index(model, expected):
    table = TABLE.set_index([c for c in TABLE if c != "n_cells"])
    np.testing.assert_array_equal(model.predict(table, params={"seed": SEED}).to_numpy(), expected)


def test_every_part_of_a_table_is_read_or_refused_by_name(model):
    with pytest.raises(Exception, match="knows no label 'celltype'"):
        model.predict(pd.DataFrame({"celltype": ["B"], "n_cells": [1]}))
    with pytest.raises(Exception, match="knows no label 'batch'"):
        model.predict(pd.DataFrame({"n_cells": [1]}, index=pd.Index(["x"], name="batch")))


def test_a_process_that_knows_nothing_of_us_gets_the_same_cells_from_the_code_in_the_model(
    registered, root, uri, expected, tmp_path
):
    program = (
        "import sys, mlflow, pandas as pd\n"
        f"mlflow.set_tracking_uri({uri!r})\n"
        "model = mlflow.pyfunc.load_model('models:/scldm-demo@champion')\n"
        f"counts = model.predict(pd.read_json('table.json', dtype=False), params={{'seed': {SEED}}})\n"
        "counts.to_csv('counts.csv', index=False)\n"
        "import pipeline\n"
        "print(pipeline.__file__)\n"
    )
    TABLE.to_json(tmp_path / "table.json")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "/code/pipeline/" in done.stdout
    np.testing.assert_array_equal(pd.read_csv(tmp_path / "counts.csv").to_numpy(), expected)


def test_the_stored_model_holds_no_pickle(registered, root):
    stored = [p for p in (root / "mlartifacts").rglob("artifacts/**/*") if p.is_file()]
    suffixes = {p.suffix for p in stored}
    assert ".safetensors" in suffixes
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin"}


def test_the_same_models_are_registered_once_and_the_alias_moves(registered, root, uri):
    again = register(root, "--alias", "candidate")
    assert "registered before: models:/scldm-demo/1" in again.output
    client = mlflow_client(uri)
    assert len(client.search_model_versions("name = 'scldm-demo'")) == 1
    assert set(client.get_registered_model("scldm-demo").aliases) == {"champion", "candidate"}


def test_a_folder_without_a_model_is_refused(tmp_path, uri):
    result = CliRunner().invoke(app, ["mlflow", "register", str(tmp_path), "--uri", uri])
    assert result.exit_code == 2
    assert "no finished train_vae or train_flow" in result.output


def test_the_line_behind_a_registered_model_is_found_by_its_alias_and_by_its_run(registered, root, uri):
    def line(name: str) -> list[tuple[str, str]]:
        return [(r.stage, r.version) for r in from_run(name, uri) if isinstance(r, StageRecord)]

    expected = [("ingest", "i1"), ("train_vae", "v1"), ("train_flow", "f1")]
    assert line("models:/scldm-demo@champion") == expected
    assert line("models:/scldm-demo/1") == expected
    assert line(read_ids(root / "demo" / "train_flow" / "f1")["run_id"]) == expected
    assert line(read_ids(root / "demo" / "train_vae" / "v1")["run_id"]) == expected[:2]


def test_folders_and_runs_compare_alike(registered, root, uri):
    run_id = read_ids(root / "demo" / "train_flow" / "f1")["parent_run_id"]
    result = CliRunner().invoke(app, ["runs", "compare", str(root / "demo"), run_id, "--uri", uri])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["train_flow", "f1", "f1"] in lines
    assert ["data_digest", "abc", "abc"] in lines


def test_a_run_that_the_store_does_not_know_is_bad_input(uri):
    result = CliRunner().invoke(app, ["runs", "compare", "0" * 32, "models:/none@champion", "--uri", uri])
    assert result.exit_code == 2
    assert "0" * 32 in result.output
    assert "models:/none@champion" in result.output
