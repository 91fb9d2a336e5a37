"""Files that a stage's settings name by path: their content is part of what the stage is made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.apply import ModelFolders
from scldm.errors import InputError


def outside_files(config: Any) -> Iterator[tuple[str, str]]:
    """What tells one content of a named input file from another: same path, other file, other version."""
    table = getattr(config, "conditions", None)
    if table is not None:
        path = Path(table).expanduser()
        if not path.is_file():
            raise InputError(f"conditions: {table}: no such file; a CSV or Parquet table of labels and n_cells")
        yield "conditions", hashlib.sha256(path.read_bytes()).hexdigest()
    genes = getattr(config, "genes", None)
    if isinstance(genes, str):
        path = Path(genes).expanduser()
        if not path.is_file():
            raise InputError(f"genes: {genes}: no such file; a text file with a gene on each line, or a list")
        yield "genes", hashlib.sha256(path.read_bytes()).hexdigest()
    options = getattr(getattr(config, "train", None), "deepspeed", None)
    if options is not None:
        path = Path(options).expanduser()
        if not path.is_file():
            raise InputError(f"train.deepspeed: {options}: no such file; a JSON file of DeepSpeed options, or null")
        yield "deepspeed", hashlib.sha256(path.read_bytes()).hexdigest()
    held_out = getattr(getattr(config, "split", None), "held_out", None)
    if held_out is not None and held_out.table is not None:
        path = Path(held_out.table).expanduser()
        if not path.is_file():
            raise InputError(f"ingest.split.held_out.table: {held_out.table}: no such file")
        yield "held_out", hashlib.sha256(path.read_bytes()).hexdigest()
    vocabulary = getattr(getattr(config, "genes", None), "vocabulary", "source")
    if vocabulary != "source":
        path = Path(vocabulary).expanduser()
        path = path / "vocabulary.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"ingest.genes.vocabulary: {vocabulary}: no such file, and no folder of a model")
        yield "vocabulary", hashlib.sha256(path.read_bytes()).hexdigest()
    models = getattr(config, "model", None)
    if isinstance(models, ModelFolders):
        for kind, folder in (("vae", models.vae), ("flow", models.flow)):
            if folder is not None:
                yield f"model.{kind}", _model_digest(Path(folder).expanduser(), f"model.{kind}: {folder}")
    source = getattr(config, "source", None)
    if source is not None and source.type == "10x" and source.obs is not None:
        path = Path(source.obs).expanduser()
        if not path.is_file():
            raise InputError(f"ingest.source.obs: {source.obs}: no such file; a table of barcodes and labels")
        yield "obs", hashlib.sha256(path.read_bytes()).hexdigest()
    if source is not None and source.type == "h5ad":
        path = Path(source.path).expanduser()
        # Sizes, not times: a copy of the same data must not retrain anything. Folders and globs are ingest's to read.
        if path.is_file():
            yield "source", str(path.stat().st_size)
        elif not path.is_dir() and not any(c in source.path for c in "*?["):
            raise InputError(f"ingest.source.path: {source.path}: no such file")


def _model_digest(folder: Path, where: str) -> str:
    """Hash of a model folder's weights and settings."""
    files = sorted(p for p in folder.glob("*") if p.suffix in (".json", ".safetensors"))
    if not files:
        raise InputError(f"{where}: no model folder; it is what training leaves in model/, or `scldm convert` writes")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as f:
            digest.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()
