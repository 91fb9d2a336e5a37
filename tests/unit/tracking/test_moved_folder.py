"""An output folder can be copied or moved: its MLflow database follows, and the original is left alone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.doctor import network as doctor_network
from pipeline.cli.doctor.finding import Requirements
from pipeline.config.job import EvaluateJob
from pipeline.tracking.mlflow_runs.client import explain, mlflow_client
from pipeline.tracking.mlflow_runs.moved import follow_move
from pipeline.tracking.mlflow_runs.pipeline_key import pipeline_key, record_key
from pipeline.tracking.mlflow_runs.runs import experiment_id
from pipeline.tracking.sync import sync
from pipeline.tracking.tracker import Tracking
from scldm.errors import InputError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An output folder with a run that holds a file."""
    root = tmp_path_factory.mktemp("a folder") / "runs"
    root.mkdir()
    client = mlflow_client(f"sqlite:///{root / 'mlflow.db'}")
    run = client.create_run(experiment_id(client, "scldm/mine", root / "mlartifacts"))
    client.log_text(run.info.run_id, "first", "first.txt")
    return root, run.info.run_id


@pytest.fixture(autouse=True)
def another_process():
    """MLflow remembers in a process where a run's files are; a folder is moved between processes."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()


def files(root: Path) -> set[str]:
    return {p.name for p in (root / "mlartifacts").rglob("*.txt")}


@pytest.mark.parametrize("name", ["copy", "it's 100 %_copied"])
def test_a_copied_folder_writes_into_its_own_artifacts(original, tmp_path, name):
    root, run = original
    copy = tmp_path / name / "runs"
    shutil.copytree(root, copy)
    assert follow_move(copy / "mlflow.db") == (root / "mlartifacts").as_uri()
    assert follow_move(copy / "mlflow.db") is None
    client = mlflow_client(f"sqlite:///{copy / 'mlflow.db'}")
    client.log_text(run, "second", "second.txt")
    later = client.create_run(experiment_id(client, "scldm/mine", copy / "mlartifacts"))
    client.log_text(later.info.run_id, "third", "third.txt")
    assert files(copy) == {"first.txt", "second.txt", "third.txt"}
    assert files(root) == {"first.txt"}
    assert [f.path for f in client.list_artifacts(run)] == ["first.txt", "second.txt"]


def test_a_folder_that_stayed_is_not_touched(original, tmp_path):
    root, _ = original
    before = (root / "mlflow.db").read_bytes()
    assert follow_move(root / "mlflow.db") is None
    assert (root / "mlflow.db").read_bytes() == before
    assert follow_move(tmp_path / "mlflow.db") is None


def test_a_deleted_experiment_is_restored_by_the_command_that_the_message_names(tmp_path):
    tmp_path = tmp_path / "a folder"
    tmp_path.mkdir()
    client = mlflow_client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    made = experiment_id(client, "scldm/mine", tmp_path / "mlartifacts")
    client.delete_experiment(made)
    with pytest.raises(InputError) as refused:
        experiment_id(client, "scldm/mine", tmp_path / "mlartifacts")
    said = explain(refused.value, "sqlite:///mlflow.db")
    assert "tracking.json" not in said
    found = doctor_network.mlflow(Requirements(output=tmp_path, experiment="scldm/mine"))
    assert found.status == "fail"
    assert f"`{found.fix}`" in said
    mlflow = Path(sys.executable).with_name("mlflow")
    done = subprocess.run(found.fix.replace(" mlflow ", f" {mlflow} "), shell=True, cwd=tmp_path.parent, check=False)
    assert done.returncode == 0
    assert doctor_network.mlflow(Requirements(output=tmp_path, experiment="scldm/mine")).status == "ok"
    assert experiment_id(client, "scldm/mine", tmp_path / "mlartifacts") == made


def track(root: Path) -> None:
    """Track one stage of a pipeline, in the database of the output folder."""
    folder = root / "mine" / "evaluate" / "a1"
    folder.mkdir(parents=True, exist_ok=True)
    with Tracking(EvaluateJob(kind="evaluate", name="mine"), root) as tracking:
        tracking.stage("evaluate", "a1", folder, {}, {}).finish()


def runs(root: Path) -> list[str]:
    client = mlflow_client(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("scldm/mine")
    return sorted(run.info.run_id for run in client.search_runs([experiment.experiment_id]))


def test_a_moved_folder_goes_on_in_its_runs_and_is_synced_where_it_is(tmp_path):
    track(tmp_path / "here")
    before = runs(tmp_path / "here")
    assert len(before) == 2, "the pipeline and its stage"
    (tmp_path / "here").rename(tmp_path / "there")
    track(tmp_path / "there")
    assert runs(tmp_path / "there") == before
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    assert [s.problem for s in sync(tmp_path / "elsewhere") if s.problem] == []
    assert runs(tmp_path / "elsewhere") == before
    assert not (tmp_path / "there").exists()


def test_a_stage_moved_without_its_database_gets_a_run_in_the_one_that_is_there(tmp_path):
    track(tmp_path / "here")
    before = runs(tmp_path / "here")
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "mine").rename(tmp_path / "there" / "mine")
    track(tmp_path / "there")
    assert len(runs(tmp_path / "there")) == 2
    assert not set(runs(tmp_path / "there")) & set(before)


def test_a_copy_beside_its_original_gets_runs_of_its_own_on_a_server_and_a_moved_folder_does_not(tmp_path):
    original, copy, moved = (tmp_path / name / "mine" for name in ("original", "copy", "moved"))
    original.mkdir(parents=True)
    key = pipeline_key(original, local=False)
    record_key(original, key)
    shutil.copytree(original, copy)
    assert pipeline_key(original, local=False) == key
    assert pipeline_key(copy, local=False) != key
    assert pipeline_key(copy, local=True) == key, "it has a copy of the database"
    moved.parent.mkdir()
    original.rename(moved)
    assert pipeline_key(moved, local=False) == key
