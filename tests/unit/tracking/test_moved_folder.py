"""An output folder can be copied or moved: its MLflow database follows, and the original is left alone."""

import shutil
from pathlib import Path

import pytest

from pipeline.tracking.mlflow_runs.client import explain, mlflow_client
from pipeline.tracking.mlflow_runs.moved import follow_move
from pipeline.tracking.mlflow_runs.runs import experiment_id
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
    client = mlflow_client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    made = experiment_id(client, "scldm/mine", tmp_path / "mlartifacts")
    client.delete_experiment(made)
    with pytest.raises(InputError) as refused:
        experiment_id(client, "scldm/mine", tmp_path / "mlartifacts")
    said = explain(refused.value, "sqlite:///mlflow.db")
    assert f"mlflow experiments restore --experiment-id {made}" in said
    assert "tracking.json" not in said
    client.restore_experiment(made)
    assert experiment_id(client, "scldm/mine", tmp_path / "mlartifacts") == made
