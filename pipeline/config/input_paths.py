"""Settings that name input files: their content is part of the version of the stage that reads them.

A setting is marked where it is declared, for example `conditions: ConditionsTable | None`. The rest follows: the file
must exist before anything starts, another content makes another version, and another place of the same content does
not. A path without a mark is a setting like any other; a test goes over every text setting, so that a new path cannot
be forgotten.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from pipeline.config.paths.cell_files import h5ad_files, soma_writes, tenx_files, tenx_outputs
from pipeline.config.paths.expand import PathText
from pipeline.core.digests import content_digest
from pipeline.core.manifest import Manifest, newest_manifest, read_manifest
from scldm.api.folders import find_model, is_remote
from scldm.errors import InputError

VOCABULARY = "vocabulary.json"
LIBRARY_SIZE = "library_size.json"


@dataclass(frozen=True)
class InputContent:
    """What is at an input path: each file with the digest of its content."""

    setting: str  # dotted path of the setting
    value: str
    files: Mapping[str, str]  # name, without the folder that all files share -> digest
    names_count: bool = True  # whether another name is another input
    changed_at: float = 0.0  # when a file, or a folder that lists files, last changed; seconds since 1970
    version_0_1: str | None = None  # the identity that version 0.1 gave it
    known_to_0_1: bool = True  # whether that identity changes with the content
    named_by_path: bool = False  # whether dataset_id of the cells is taken from the path

    @property
    def digest(self) -> str:
        """Hash of the content, the same for a copy at another place."""
        what = sorted(self.files.items()) if self.names_count else sorted(self.files.values())
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


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
    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        """Return the content; None if the value names no file.

        Args:
            setting: Dotted path of the setting.
            owner: The settings beside this one.

        Raises:
            FileNotFoundError: Nothing usable is at that path.
        """


class InputFile(InputPath):
    """A file that is read whole."""

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        path = Path(value).expanduser()
        if not path.is_file():
            raise FileNotFoundError
        digest = content_digest(path)
        return InputContent(setting, value, {path.name: digest}, names_count=False, version_0_1=digest)


class VocabularyFile(InputFile):
    """A list of genes, or a model, whose vocabulary.json is read. `source` is no path."""

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        if value == "source":
            return None
        return super().content(setting, str(vocabulary_file(value)), owner)


@dataclass(frozen=True)
class ModelName(InputPath):
    """A model, by any of the names that `scldm.api.folders` knows.

    Args:
        kind: Which of the models that a pipeline has.
    """

    kind: Literal["vae", "flow"]

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        folder = find_model(value, self.kind)
        digests = {p.name: content_digest(p) for p in sorted(folder.glob("*")) if p.suffix in (".json", ".safetensors")}
        before = hashlib.sha256()
        for name, digest in digests.items():
            before.update(name.encode() + bytes.fromhex(digest))
        return InputContent(setting, value, digests, version_0_1=before.hexdigest())


class ModelPair(InputPath):
    """A VAE and its flow under one name."""

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        kinds: tuple[Literal["vae", "flow"], ...] = ("vae", "flow")
        parts = {k: ModelName(self.expected, self.key, k).content(setting, value, owner) for k in kinds}
        return InputContent(setting, value, {f"{k}/{n}": d for k, c in parts.items() if c for n, d in c.files.items()})


class IngestedCells(InputPath):
    """A finished ingest: a pipeline's newest, the newest of a stage, or one version."""

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        found = ingest_of(value)
        return InputContent(setting, value, {"ingest": f"{found.version} {found.facts.get('digest', '')}"})


class LibrarySizeFile(InputPath):
    """Statistics of library sizes, or cells that have some."""

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        path = library_size_file(value)
        return InputContent(setting, value, {path.name: content_digest(path)}, names_count=False)


class H5adFiles(InputPath):
    """`.h5ad` files: one, a folder or a glob pattern. With several, their names become data sets."""

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        path = Path(value).expanduser()
        if not (files := [p for p in h5ad_files(value) if p.is_file()]):
            return _no_content(path)
        size = str(path.stat().st_size) if path.is_file() else None
        found = _of_files(setting, value, files, folders=[] if path.is_file() else [p.parent for p in files])
        return replace(found, names_count=len(files) > 1, version_0_1=size)


class TenxFiles(InputPath):
    """Cell Ranger outputs: all files that are read of each."""

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        outputs = tenx_outputs(value)
        files = [p for output in outputs for p in tenx_files(output)]
        if not files:
            return _no_content(Path(value).expanduser())
        listed = [p.parent for p in outputs if p != Path(value).expanduser()]
        found = _of_files(setting, value, files, folders=[*listed, *(p.parent for p in files)])
        return replace(found, named_by_path=len(outputs) == 1)


class SomaExperiment(InputPath):
    """A SOMA experiment, identified by the writes that it consists of: it is not read."""

    def content(self, setting: str, value: str, owner: BaseModel) -> InputContent | None:
        settings: Any = owner
        s3 = partial(settings.s3.filesystem, region=settings.region, anonymous=settings.anonymous)
        writes = soma_writes(value, settings.measurement, settings.layer, s3)
        if not writes:
            return None if "://" in value else _no_content(Path(value).expanduser())
        names = {array: json.dumps([e.name for e in entries]) for array, entries in writes.items()}
        digests = {array: hashlib.sha256(text.encode()).hexdigest() for array, text in names.items()}
        changed_at = max(e.changed_at for entries in writes.values() for e in entries)
        return InputContent(setting, value, digests, changed_at=changed_at, known_to_0_1=False)


def ingest_of(name: str) -> Manifest:
    """Return the manifest of the ingest that a path names: a pipeline, its ingest, or one version of it.

    Raises:
        FileNotFoundError: Nothing is there.
        InputError: Something else is there.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError
    if (found := find_ingest(folder)) is None:
        raise InputError(f"{name} has no finished ingest; name the folder of a pipeline (runs/census) or of its ingest")
    return found


def find_ingest(folder: Path) -> Manifest | None:
    """Return the newest ingest of a pipeline or of the stage, or that of a version; None for another folder."""
    found = read_manifest(folder) or newest_manifest(folder, "ingest") or newest_manifest(folder.parent, folder.name)
    return found if found is not None and found.stage == "ingest" else None


def library_size_file(name: str) -> Path:
    """Return the file that generate.library_size.of names: an `.h5ad` file, or the statistics of an ingest or a model.

    Raises:
        FileNotFoundError: Nothing is there.
        InputError: Something else is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in (".json", ".h5ad"):
            raise InputError(f"{name} is neither an .h5ad file of counts nor a library_size.json; name one of them")
        return path
    if not path.is_dir() and not is_remote(name):
        raise FileNotFoundError
    if (path / LIBRARY_SIZE).is_file():
        return path / LIBRARY_SIZE
    if (ingest := find_ingest(path)) is not None:
        return Path(ingest.folder) / LIBRARY_SIZE
    return find_model(name, "vae") / LIBRARY_SIZE


def vocabulary_file(name: str) -> Path:
    """Return the file with the genes that `ingest.genes.vocabulary` names: a list of genes, or a model's."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / VOCABULARY).is_file():
        return path / VOCABULARY
    return find_model(name, "vae") / VOCABULARY if is_remote(name) or path.is_dir() else path


def _no_content(path: Path) -> InputContent | None:
    """Return None for a folder or pattern without cells: its reader says what it holds instead.

    Raises:
        FileNotFoundError: The path does not exist and is no pattern.
    """
    if not path.exists() and not any(c in str(path) for c in "*?["):
        raise FileNotFoundError
    return None


def _of_files(setting: str, value: str, files: Sequence[Path], *, folders: Sequence[Path]) -> InputContent:
    """Return the content of cells in files, which version 0.1 did not know."""
    places = [p.absolute() for p in files]
    shared = os.path.commonpath([p.parent for p in places])
    digests = {os.path.relpath(p, shared): content_digest(p) for p in places}
    # The time of the last change of name or content, which a program cannot set.
    changed_at = max(p.stat().st_ctime for p in [*places, *folders])
    return InputContent(setting, value, digests, changed_at=changed_at, known_to_0_1=False)


ConditionsTable = Annotated[PathText, InputFile("a CSV, TSV or Parquet table of labels and n_cells", "conditions")]
GeneFile = Annotated[PathText, InputFile("a text file with one gene on each line, or a list of genes", "genes")]
VectorFile = Annotated[PathText, InputFile("a .npy file of numbers, as numpy.save writes it", "decoder_condition")]
GeneTable = Annotated[
    PathText, InputFile("a table with a vector for each gene: CSV, TSV or Parquet", "gene_embeddings")
]
VectorTable = Annotated[
    PathText, InputFile("a table with a vector for each name: CSV, TSV or Parquet", "label_values.embeddings")
]
DeepSpeedFile = Annotated[PathText, InputFile("a JSON file of DeepSpeed options, or null", "deepspeed")]
HeldOutTable = Annotated[PathText, InputFile("a CSV or Parquet table of combinations of labels", "held_out")]
GeneVocabulary = Annotated[PathText, VocabularyFile("a file of genes, or the folder of a model", "vocabulary")]
BarcodeTable = Annotated[PathText, InputFile("a table of barcodes and labels", "obs")]
H5adPath = Annotated[PathText, H5adFiles("an .h5ad file, a folder of them, or a glob pattern", "source")]
TenxPath = Annotated[
    PathText, TenxFiles("a Cell Ranger folder or .h5 file, a folder of them, or a glob pattern", "source")
]
SomaUri = Annotated[PathText, SomaExperiment("a SOMA experiment", "source")]
_MODEL = "a model: a folder, a stage or pipeline (runs/demo), models:/NAME@ALIAS, hf://ORG/NAME or s3://…"
TeacherFlow = Annotated[PathText, ModelName(_MODEL, "distil.flow", "flow")]
VaeName = Annotated[PathText, ModelName(_MODEL, "model.vae", "vae")]
FlowName = Annotated[PathText, ModelName(_MODEL, "model.flow", "flow")]
PretrainedVae = Annotated[PathText, ModelName(_MODEL, "pretrained.vae", "vae")]
StartVae = Annotated[PathText, ModelName(_MODEL, "start_from.vae", "vae")]
LibrarySizePlace = Annotated[
    PathText, LibrarySizeFile("a pipeline, an ingest or a model, or an .h5ad file of counts", "library_size")
]
OldModels = Annotated[PathText, ModelPair(_MODEL, "replay.model")]
OldCells = Annotated[PathText, IngestedCells("the folder of a pipeline with a finished ingest", "replay.pipeline")]
StartFlow = Annotated[PathText, ModelName(_MODEL, "start_from.flow", "flow")]


def input_contents(config: BaseModel, *, where: str = "") -> dict[str, InputContent]:
    """Look at the content of every input that a stage's settings name.

    Args:
        where: Prefix of the setting in messages, for example `ingest.`.

    Returns:
        Key of the input -> its content.

    Raises:
        InputError: Inputs are missing; all of them are named.
    """
    found: dict[str, InputContent] = {}
    problems: list[str] = []
    for path, value, mark, owner in named_inputs(config):
        try:
            content = mark.content(path, value, owner)
        except FileNotFoundError:
            problems.append(f"{where}{path}: {value}: no such file; expected {mark.expected}")
        except OSError as error:
            reason = (str(error.strerror or error).splitlines() or ["no message"])[0]
            problems.append(f"{where}{path}: {value}: cannot be read ({reason})")
        except InputError as error:
            problems.append(f"{where}{path}: {error}")
        else:
            if content is not None:
                found[_key(mark, path)] = content
    if problems:
        raise InputError("\n".join(problems))
    return found


def _key(mark: InputPath, path: str) -> str:
    """Return the key of an input. Old cells of ingest.replay may have a source beside that of the new cells, and
    several labels may have a table of vectors."""
    return path if path.startswith(("replay.", "label_values.")) else mark.key


def settings_without_paths(config: BaseModel, contents: Mapping[str, InputContent]) -> dict[str, Any]:
    """Return the settings as plain data, with the digest of its content in place of each input path.

    The path stays beside it if a setting uses the dataset_id that is taken from it.
    """
    settings = config.model_dump(mode="json")
    uses_names = "dataset_id" in json.dumps(settings)
    for content in contents.values():
        place, name = _place_of(settings, content.setting)
        place[name] = {"content": content.digest}
        if content.named_by_path and uses_names:
            place[name] |= {"path": content.value}
    return settings


def _place_of(settings: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the section that holds a setting, and the setting's name in it; a label in the path may hold points."""
    while path not in settings:
        key = max((k for k in settings if path.startswith(f"{k}.")), key=len)
        settings, path = settings[key], path.removeprefix(f"{key}.")
    return settings, path


def named_inputs(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, InputPath, BaseModel]]:
    """Yield (dotted path, value, mark, the settings beside it) of every input path that is set below a config."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        path = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from named_inputs(value, f"{path}.")
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, BaseModel):
                    yield from named_inputs(inner, f"{path}.{key}.")
        elif isinstance(value, str) and (mark := mark_of(field.annotation, field.metadata)) is not None:
            yield path, value, mark, config


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
