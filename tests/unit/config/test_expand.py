"""Every path of a job file may hold ~ and variables, and a variable that is not set is never an empty text."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.config.io.loader import load_job, resolved_yaml
from pipeline.config.job import IngestConfig
from pipeline.config.paths.expand import expand_path
from scldm.errors import InputError


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


def load(tmp_path, text: str, *overrides: str):
    (tmp_path / "job.yaml").write_text(text)
    return load_job(tmp_path / "job.yaml", list(overrides))


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("$SCRATCH/runs", "/scratch/me/runs"),
        ("~/runs", "/home/me/runs"),
        ("~", "/home/me"),
        ("sqlite:///~/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("sqlite:///$SCRATCH/mlflow.db", "sqlite:////scratch/me/mlflow.db"),
        ("s3://bucket/$SCRATCH", "s3://bucket//scratch/me"),
        ("a$$SCRATCH", "a$SCRATCH"),
        ("price$5/a~b", "price$5/a~b"),
    ],
)
def test_variables_and_home_are_put_in(written, path):
    assert expand_path(written) == path


@pytest.mark.parametrize("written", ["$$UNSET/runs", "$SCRATCH/a$$$$b", "price$5"])
def test_a_recorded_job_runs_again_with_its_dollar_signs(tmp_path, written):
    source = f"{{type: h5ad, path: '{written}/cells.h5ad'}}"
    inputs = f"{{train_vae: '{written}'}}"
    job = load(tmp_path, f"kind: ingest\nname: a\nsource: {source}\noutput: '{written}'\ncache: '{written}'\n"
                         f"inputs: {inputs}\n")  # fmt: skip
    assert "$" in job.output
    assert load(tmp_path, resolved_yaml(job)) == job


@pytest.mark.parametrize("written", ["$UNSET/runs", "$EMPTY/runs"])
def test_a_variable_that_is_not_set_is_an_error(tmp_path, written):
    with pytest.raises(InputError, match=r"output: .*no variable (UNSET|EMPTY) is set .* export it"):
        load(tmp_path, f"kind: ingest\nname: a\nsource: {{type: synthetic}}\noutput: {written}\n")


def test_the_other_spelling_of_a_variable_is_refused_with_this_one(tmp_path):
    with pytest.raises(InputError, match=r"\$NAME for a variable in a path"):
        load(tmp_path, "kind: ingest\nname: a\nsource: {type: synthetic}\noutput: ${SCRATCH}/runs\n")


def test_a_user_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"output: ~nobody-here/runs: there is no user 'nobody-here'"):
        load(tmp_path, "kind: ingest\nname: a\nsource: {type: synthetic}\noutput: ~nobody-here/runs\n")


def test_every_path_setting_is_expanded(tmp_path):
    job = load(
        tmp_path,
        """
kind: ingest
name: a
output: $SCRATCH/runs
cluster: ~/cluster.yaml
checkpoints: {storage_path: $SCRATCH/checkpoints}
tracking: {uri: sqlite:///$SCRATCH/mlflow.db}
inputs: {train_vae: $SCRATCH/vae}
source: {type: 10x, path: "$SCRATCH/*/outs", obs: ~/cells.csv}
genes: {vocabulary: $SCRATCH/genes.txt}
split: {held_out: {table: $SCRATCH/held_out.csv}}
cache: $SCRATCH/cache
""",
    )
    text = job.model_dump_json()
    assert "$" not in text
    assert "~" not in text
    assert job.source.path == "/scratch/me/*/outs"
    assert load(tmp_path, "kind: ingest\nname: a\nsource: {type: soma, uri: ~/x}\n").source.uri == "/home/me/x"


def test_overrides_of_the_command_line_are_expanded_too(tmp_path):
    job = load(tmp_path, "kind: ingest\nname: a\nsource: {type: synthetic}\n", "output=~/runs", "cache=$SCRATCH/c")
    assert (job.output, job.cache) == ("/home/me/runs", "/scratch/me/c")


def test_a_record_is_read_as_it_was_written():
    given = {"source": {"type": "h5ad", "path": "$UNSET/a.h5ad"}}
    assert IngestConfig.model_validate(given).source.path == "$UNSET/a.h5ad"


def test_names_and_expressions_are_not_paths(tmp_path):
    job = load(tmp_path, "kind: ingest\nname: a\nsource: {type: synthetic}\nobs_filter: \"a == '$UNSET'\"\n")
    assert job.obs_filter == "a == '$UNSET'"
    with pytest.raises(ValidationError):
        IngestConfig.model_validate({"source": {"type": "h5ad", "path": 3}})
