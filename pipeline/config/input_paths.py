"""Settings that name input files: their content is part of the version of the stage that reads them.

A setting is marked where it is declared, for example `conditions: ConditionsTable | None`. The rest follows: the file
must exist before anything starts, and another content makes another version. A path without a mark has no influence on
versions; a test goes over every text setting, so that a new path cannot be forgotten.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from scldm.errors import InputError


@dataclass(frozen=True)
class InputPath(ABC):
    """Marks a text setting as the path of something that its stage reads.

    Args:
        expected: What must be there, for the error message.
        key: Name of this input in the hash. Fixed, so that renaming or moving a setting does not change versions.
    """

    expected: str
    key: str

    @abstractmethod
    def identity(self, value: str) -> str | None:
        """Return text that changes with the content and not with a copy; None if the stage itself identifies it.

        Raises:
            FileNotFoundError: Nothing usable is at that path.
        """


class InputFile(InputPath):
    """A file that is read whole."""

    def identity(self, value: str) -> str | None:
        path = Path(value).expanduser()
        if not path.is_file():
            raise FileNotFoundError
        return hashlib.sha256(path.read_bytes()).hexdigest()


class VocabularyFile(InputFile):
    """A list of genes, or the folder of a model, whose vocabulary.json is read. `source` is no path."""

    def identity(self, value: str) -> str | None:
        if value == "source":
            return None
        path = Path(value).expanduser()
        return super().identity(str(path / "vocabulary.json" if path.is_dir() else path))


class ModelFolder(InputPath):
    """A model folder, as training and `scldm convert` write it."""

    def identity(self, value: str) -> str | None:
        files = sorted(p for p in Path(value).expanduser().glob("*") if p.suffix in (".json", ".safetensors"))
        if not files:
            raise FileNotFoundError
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as f:
                digest.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
        return digest.hexdigest()


class CellFiles(InputPath):
    """Files of cells: one, a folder or a glob pattern."""

    def identity(self, value: str) -> str | None:
        path = Path(value).expanduser()
        if path.is_file():
            return str(path.stat().st_size)  # not its time: a copy of the same data must not train again
        if not path.is_dir() and not any(c in value for c in "*?["):
            raise FileNotFoundError
        return None  # folders and patterns are resolved by ingest


ConditionsTable = Annotated[str, InputFile("a CSV, TSV or Parquet table of labels and n_cells", "conditions")]
GeneFile = Annotated[str, InputFile("a text file with one gene on each line, or a list of genes", "genes")]
DeepSpeedFile = Annotated[str, InputFile("a JSON file of DeepSpeed options, or null", "deepspeed")]
HeldOutTable = Annotated[str, InputFile("a CSV or Parquet table of combinations of labels", "held_out")]
GeneVocabulary = Annotated[str, VocabularyFile("a file of genes, or the folder of a model", "vocabulary")]
BarcodeTable = Annotated[str, InputFile("a table of barcodes and labels", "obs")]
H5adPath = Annotated[str, CellFiles("an .h5ad file, a folder of them, or a glob pattern", "source")]
_MODEL = "a model folder, which training leaves in model/ and `scldm convert` writes"
VaeFolder = Annotated[str, ModelFolder(_MODEL, "model.vae")]
FlowFolder = Annotated[str, ModelFolder(_MODEL, "model.flow")]


def input_identities(config: BaseModel, *, where: str = "") -> dict[str, str]:
    """Identify the content of every input file that a stage's settings name.

    Args:
        where: Prefix of the setting in messages, for example `ingest.`.

    Returns:
        Key of the input -> identity of its content.

    Raises:
        InputError: Files are missing; all of them are named.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    for path, value, mark in named_inputs(config):
        try:
            identity = mark.identity(value)
        except FileNotFoundError:
            problems.append(f"{where}{path}: {value}: no such file; expected {mark.expected}")
        except OSError as error:
            problems.append(f"{where}{path}: {value}: cannot be read ({error.strerror or error})")
        else:
            if identity is not None:
                found[mark.key] = identity
    if problems:
        raise InputError("\n".join(problems))
    return found


def named_inputs(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, InputPath]]:
    """Yield (dotted path, value, mark) of every input path that is set below a config."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        path = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from named_inputs(value, f"{path}.")
        elif isinstance(value, str) and (mark := mark_of(field.annotation, field.metadata)) is not None:
            yield path, value, mark


def mark_of(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> InputPath | None:
    """Return the mark of a setting's annotation, also inside a union; None if it has none."""
    for item in metadata:
        if isinstance(item, InputPath):
            return item
    if get_origin(annotation) is Annotated:
        return mark_of(get_args(annotation)[0], annotation.__metadata__)
    for member in get_args(annotation):
        if (mark := mark_of(member)) is not None:
            return mark
    return None
