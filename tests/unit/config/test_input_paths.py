"""Input files are declared on the settings that name them: they must exist, and their content decides the version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from pipeline.config.input_paths import InputFile, input_contents, mark_of, named_inputs
from pipeline.config.job import STAGE_CONFIGS, GenerateConfig, IngestConfig, JobBase, TrainFlowConfig, TrainVaeConfig
from scldm.config import StrictModel
from scldm.errors import InputError

NOT_INPUT_FILES = {
    # places that are written to, or addresses that the stage itself identifies
    "output", "cache", "storage_path", "uri", "endpoint", "region", "addressing", "cluster", "version", "inputs",
    # names and expressions
    "name", "kind", "experiment", "salt", "layer", "measurement", "gene_id", "gene_name", "genome", "columns", "labels",
    "obs_filter", "value_filter", "tissue", "assay", "organism", "where", "combinations", "keep_obs", "to", "control",
    "cells", "per_label", "genes", "guidance", "missing_text", "parents", "freeze", "unit", "separator", "zero",
}  # fmt: skip


def text_settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, list[Any]]]:
    """(dotted path, annotation, metadata) of every setting that may hold text."""
    for name, field in model.model_fields.items():
        models = list(nested_models(field.annotation))
        for nested in models:
            yield from text_settings(nested, f"{prefix}{name}.")
        if not models and holds_text(field.annotation):
            yield f"{prefix}{name}", field.annotation, list(field.metadata)


def nested_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for member in get_args(annotation):
            yield from nested_models(member)


def holds_text(annotation: Any) -> bool:
    if annotation is str:
        return True
    return get_origin(annotation) is not Literal and any(holds_text(a) for a in get_args(annotation))


@pytest.mark.parametrize("model", [*STAGE_CONFIGS.values(), JobBase], ids=lambda m: m.__name__)
def test_every_text_setting_is_a_declared_input_or_known_not_to_be_one(model):
    for path, annotation, metadata in text_settings(model):
        last = path.rpartition(".")[2]
        known = last in NOT_INPUT_FILES or any(path.endswith(p) for p in NOT_INPUT_FILES if "." in p)
        marked = mark_of(annotation, metadata) is not None
        assert marked or known, f"{path}: declare it with a type of pipeline/config/input_paths.py, or list it here"


def test_the_declared_inputs_are_these():
    def declared(model):
        return {path for path, annotation, metadata in text_settings(model) if mark_of(annotation, metadata)}

    assert declared(GenerateConfig) == {
        "conditions",
        "decoder_condition",
        "genes",
        "model.vae",
        "model.flow",
        "library_size.of",
    }
    assert declared(TrainVaeConfig) == {
        "train.deepspeed",
        "pretrained",
        "start_from.model",
        "start_from.gene_embeddings",
    }
    assert declared(TrainFlowConfig) == {"train.deepspeed", "start_from.model"}
    assert declared(IngestConfig) == {
        "source.path",
        "source.obs",
        "source.uri",
        "genes.vocabulary",
        "split.held_out.table",
        "label_values.embeddings",
        "replay.pipeline",
        "replay.model",
        "replay.source.path",
        "replay.source.obs",
        "replay.source.uri",
    }
    assert declared(STAGE_CONFIGS["perturb"]) >= {"model.vae", "model.flow", "source.path", "source.obs"}


class Inner(StrictModel):
    table: Annotated[str, InputFile("a table", "table")] | None = None


class Outer(StrictModel):
    inner: Inner = Inner()
    genes: list[str] | Annotated[str, InputFile("genes", "genes")] = []


def test_a_file_is_identified_by_its_content_and_not_by_its_name(tmp_path):
    one, two = tmp_path / "a.csv", tmp_path / "b.csv"
    one.write_text("x")
    two.write_text("x")
    assert digest(one) == digest(two)
    two.write_text("y")
    assert digest(one) != digest(two)


def digest(path) -> str:
    return input_contents(Outer(inner=Inner(table=str(path))))["table"].digest


def test_only_the_member_of_a_union_that_is_text_names_a_file(tmp_path):
    assert list(named_inputs(Outer(genes=["A", "B"]))) == []
    (tmp_path / "genes.txt").write_text("A")
    assert list(input_contents(Outer(genes=str(tmp_path / "genes.txt")))) == ["genes"]


def test_all_missing_files_are_named_at_once(tmp_path):
    config = Outer(inner=Inner(table="no.csv"), genes="no.txt")
    with pytest.raises(InputError) as error:
        input_contents(config, where="generate.")
    assert "generate.inner.table: no.csv: no such file; expected a table" in str(error.value)
    assert "generate.genes: no.txt: no such file" in str(error.value)
