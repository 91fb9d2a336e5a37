"""What a bad job file is told, and that a good one arrives as it was written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config.io.loader import json_schema, load_job, resolved_yaml
from pipeline.config.job import OWN_JOBS, STAGES, PipelineJob, TrainVaeJob
from scldm.errors import InputError

LINE = """\
#!/usr/bin/env -S python -m pipeline run
kind: pipeline
name: demo
ingest:
  source: {type: synthetic, n_cells: 40}
train_vae:
  train:
    max_steps: 7
generate:
  per_label: {cell_type: 5}
"""
ONE_STAGE = "kind: ingest\nname: a\nsource: {type: synthetic}\n"


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str | bytes) -> Path:
        path = tmp_path / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_job(path, list(overrides))
    return str(caught.value).replace(str(path), "job.yaml").splitlines()


def only_error(path: Path, *overrides: str) -> str:
    found = errors(path, *overrides)
    assert len(found) == 1, found
    return found[0]


# ---- a good file ---------------------------------------------------------------------------------------------------
def test_a_job_file_is_read_with_its_defaults(write):
    job = load_job(write(LINE))
    assert isinstance(job, PipelineJob)
    assert job.train_vae.train.max_steps == 7
    assert job.train_vae.train.keep_last == 2


@pytest.mark.parametrize(
    ("job", "words"),
    [
        # A similar key of the section is not what is meant if another section has this very one.
        (LINE + "train: {max_steps: 3}\n", "train: unknown key here; did you mean `train_vae.train` or `train_flow."),
        (ONE_STAGE + "ingest: {split: {by: tile}}\n", "settings at the top level: split.by instead of ingest.split.by"),
        (ONE_STAGE + "ingest: {}\n", "ingest: unknown key; a job of kind ingest has these settings at the top level"),
        # Other kinds of sources have a path, and it would be at this place.
        ("kind: ingest\nname: a\nsource: {type: synthetic, path: x}\n", "unknown key; allowed here: type, n_cells"),
    ],
)
def test_a_setting_in_the_wrong_place_is_told_its_place(write, job, words):
    assert words in only_error(write(job))


def test_resolved_yaml_loads_back_to_the_same_job(write):
    job = load_job(write(LINE), ["train_flow.train.optimizer.lr=1e-5", "generate.sampler.guidance={cell_type: 2}"])
    assert load_job(write(resolved_yaml(job))) == job


def test_scalars_mean_what_they_look_like(write):
    text = "kind: ingest\nname: demo\nsource: {type: census, version: 2025-01-30}\nsplit: {salt: no}\n"
    job = load_job(write(text))
    assert job.source.version == "2025-01-30"
    assert job.split.salt == "no"
    assert load_job(write(LINE), ["train_vae.train.optimizer.lr=1e-3"]).train_vae.train.optimizer.lr == 0.001


def test_aliases_may_be_used_with_measure(write):
    text = LINE + "train_flow: {train: {feed: &feed {batch_size: 32}}}\n"
    text = (
        text.replace("    max_steps: 7\n", "    max_steps: 7\n    feed: {batch_size: 32}\n")
        + "tracking: &t {uri: null}\n"
    )
    assert load_job(write(text)).train_flow.train.feed.batch_size == 32


def test_the_schema_names_every_kind():
    assert set(json_schema()["discriminator"]["mapping"]) == {"pipeline", *STAGES, *OWN_JOBS}


# ---- overrides -----------------------------------------------------------------------------------------------------
def test_overrides_are_yaml_and_the_last_one_wins(write):
    job = load_job(
        write(LINE),
        [
            "train_vae.train.max_steps=9",
            "train_vae.train.max_steps=11",
            "train_vae.train.feed.max_genes=null",
            "ingest.labels=[cell_type, donor_id]",
            "resources={workers: 3}",
        ],
    )
    assert job.train_vae.train.max_steps == 11
    assert job.ingest.labels == ["cell_type", "donor_id"]
    assert job.resources.workers.max == 3


def test_an_override_replaces_the_whole_value(write):
    job = load_job(write(LINE), ["generate.per_label={donor_id: 3}", "ingest.source={type: h5ad, path: x.h5ad}"])
    assert job.generate.per_label == {"donor_id": 3}
    assert job.ingest.source.type == "h5ad"


def test_an_empty_override_is_told_about_null(write):
    message = only_error(write(LINE), "generate.n_cells=")
    assert "generate.n_cells=null" in message


@pytest.mark.parametrize("text", ["train", "--lr=3", "=3", "+a.b=3", "a..b=3"])
def test_something_else_than_an_override_is_refused(write, text):
    assert "an override is key.path=value" in only_error(write(LINE), text)


def test_an_override_into_a_value_is_refused(write):
    assert "train_vae.train.max_steps is a value, not a section" in only_error(
        write(LINE), "train_vae.train.max_steps.x=1"
    )


def test_errors_of_overrides_say_command_line(write):
    found = errors(write(LINE), "train_vae.train.max_step=3", "train_vae.train.keep_last=none")
    assert found == [
        'job.yaml (command line): train_vae.train.keep_last: got "none", expected a positive integer',
        "job.yaml (command line): train_vae.train.max_step: unknown key; did you mean `max_steps`?",
    ]


def test_a_rule_between_two_keys_names_the_command_line_where_one_was_overridden(write):
    message = only_error(write(LINE), "train_vae.model.d_model=30")
    assert message == "job.yaml (command line): train_vae.model: d_model (30) must be a multiple of n_heads (4)"


# ---- what is wrong with the values ----------------------------------------------------------------------------------
def test_all_errors_are_said_at_once_with_their_lines(write):
    text = LINE.replace("7", "many").replace("n_cells: 40", "n_cell: 40") + "evaluate: {split: tset}\nsede: 3\n"
    assert errors(write(text)) == [
        "job.yaml:5: ingest.source.n_cell: unknown key; did you mean `n_cells`?",
        'job.yaml:8: train_vae.train.max_steps: got "many", expected a positive integer',
        'job.yaml:11: evaluate.split: got "tset", expected one of "validation", "test"; did you mean `test`?',
        "job.yaml:12: sede: unknown key; did you mean `seed`?",
    ]


def test_a_key_on_the_wrong_level_is_told_where_it_belongs(write):
    message = only_error(write(LINE + "max_steps: 5\n"))
    assert "`train_vae.train.max_steps` or `train_flow.train.max_steps`" in message


def test_an_unlike_key_is_told_what_is_allowed(write):
    assert "allowed here: batch_size, splits" in only_error(write(LINE + "encode: {xyz: 1}\n"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kind: lime", 'got "lime", expected one of "pipeline", "ingest"'),
        ("kind: [pipeline]", 'kind: got ["pipeline"], expected one of "pipeline"'),
        ("knd: pipeline", 'kind: missing; expected one of "pipeline", "ingest"'),
    ],
)
def test_a_wrong_kind_is_told_the_kinds(write, kind, expected):
    assert expected in errors(write(LINE.replace("kind: pipeline", kind)))[0]


def test_a_wrong_source_is_told_the_types(write):
    message = only_error(write(LINE.replace("synthetic", "h5")))
    assert message.startswith('job.yaml:5: ingest.source.type: got "h5", expected one of "synthetic", "h5ad"')
    assert "did you mean `h5ad`?" in message


def test_paths_do_not_name_union_members(write):
    text = LINE + "train_flow: 3\n"
    found = errors(write(text), "generate.sampler.guidance=much", "generate.cells=[{n_cells: 3}, 5]")
    assert (
        'generate.sampler.guidance: got "much", expected a map (each value a number) or a number' in found[1] + found[2]
    )
    assert any("generate.cells[1]: got 5, expected a map" in e for e in found)
    assert found[0].startswith("job.yaml:11: train_flow: got 3, expected a section with keys model, flow, start, train")


def test_a_section_inside_its_own_kind_of_job_is_an_unknown_key(write):
    text = "kind: train_vae\nname: demo\ntrain_vae: {train: {max_steps: 3}}\n"
    assert only_error(write(text)).startswith("job.yaml:3: train_vae: unknown key")


def test_missing_keys_are_named_with_their_section(write):
    assert only_error(write("kind: pipeline\nname: demo\ningest: {}\ngenerate: {}\n")) == (
        "job.yaml:3: ingest.source: missing; expected a section with keys type, n_cells, n_genes, n_types, n_donors, "
        "n_treatments, within_types, seed or a section with keys type, path, layer, columns, gene_id, gene_name "
        "or a section with keys type, path, genome, obs, columns "
        "or a section with keys type, uri, region, anonymous, s3, measurement, layer "
        "or a section with keys type, version, organism, s3"
    )


@pytest.mark.parametrize("name", ["../../x", "/abs", "a b", "x" * 300, "$(reboot)", "'\0'", "-x"])
def test_names_that_are_no_names_are_refused(write, name):
    assert errors(write(LINE.replace("name: demo", f"name: {name}")))


@pytest.mark.parametrize("value", ["true", '"7"', "1.5", ".nan", "null", "[7]", "0", "-3"])
def test_an_integer_is_an_integer(write, value):
    assert "train_vae.train.max_steps: got" in only_error(write(LINE.replace("max_steps: 7", f"max_steps: {value}")))


# ---- what is wrong with the file ------------------------------------------------------------------------------------
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "this one is empty"),
        (b"- a\n- b\n", "this one is a list"),
        (b"\xef\xbb\xbfkind: pipeline\n", "job.yaml:1: starts with a byte-order mark"),
        (b"kind: pipeline\nname: caf\xe9\n", "job.yaml:2: byte 0xe9 is not UTF-8"),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "not UTF-8"),
        (b"kind: pipeline\x00\n", "not YAML text"),
        (b"kind: pipeline\n\tname: x\n", "job.yaml:2: column 1: a tab; YAML is indented with spaces"),
        (b"kind: pipeline\nname: a\nname: b\n", "job.yaml:3: column 1: name is written twice, first on line 2"),
        (b"kind: [line\n", "job.yaml:2: column 1"),
        (b"a: !!python/object/apply:os.system [id]\n", "job.yaml:1: column 4: tag"),
        (b"a: !secret x\n", "has no tags"),
        (b"name: ${oc.env:HOME}\n", "job.yaml:1:"),
        (b"a: &a [*a]\n", "an alias (*name) that contains itself"),
        (b"[" * 200_000, "nested deeper than 30 levels"),
        (b"x: " + b"y" * 1_100_000, "larger than 1,000,000 bytes"),
        (BOMB.encode(), "once aliases (*name) are followed"),
        (b"? [a, b]\n: c\n", "a key must be a word"),
        (b"kind: pipeline\n---\nkind: pipeline\n", "expected a single document"),
    ],
)
def test_a_file_that_is_no_job_is_refused_quickly_and_clearly(write, text, expected):
    began = time.monotonic()
    assert expected in "\n".join(errors(write(text)))
    assert time.monotonic() - began < 2


def test_interpolation_in_an_override_is_refused(write):
    assert "interpolation" in only_error(write(LINE), "name=${eval:1}")


def test_a_file_that_is_not_there_is_told_what_is(write, tmp_path):
    write(LINE)
    message = only_error(tmp_path / "jub.yaml")
    assert "no such file" in message
    assert "job.yaml" in message


def test_a_folder_is_no_job(tmp_path):
    assert "is a folder" in only_error(tmp_path)


def test_a_stage_job_may_hold_earlier_stages(write):
    text = "kind: train_vae\nname: demo\ningest: {source: {type: synthetic}}\ntrain: {max_steps: 3}\n"
    job = load_job(write(text))
    assert isinstance(job, TrainVaeJob)
    assert job.ingest is not None


def test_a_line_takes_a_gaussian_head_and_refuses_a_decoder_that_it_cannot_train():
    ingest = {"source": {"type": "synthetic"}}
    line = {"kind": "pipeline", "name": "x", "ingest": ingest, "generate": {"n_cells": 5}}
    model = PipelineJob.model_validate({**line, "train_vae": {"model": {"head": "gaussian"}}}).train_vae.model
    assert (model.head, model.gene_bias) == ("gaussian", False)
    with pytest.raises(ValidationError, match=r"head gaussian has none: set it to false"):
        PipelineJob.model_validate({**line, "train_vae": {"model": {"head": "gaussian", "gene_bias": True}}})
    with pytest.raises(ValidationError, match=r"adaln.*needs a condition vector"):
        PipelineJob.model_validate({**line, "train_vae": {"model": {"adaln": True}}})
