"""Fetch models that are not in a folder of this machine; `scldm.api.folders` finds this by its entry point.

    models:/census-vae@champion, models:/census-vae/3    a version of a model that `scldm mlflow register` made
    hf://org/name@revision, or org/name@revision         a repository of the Hugging Face hub (`huggingface_hub`)
    s3://bucket/folder                                   objects; options as in s3://…?region=us-west-2&anonymous=true

A model is fetched once, to SCLDM_CACHE (default ~/.cache/scldm), and a whole folder appears there by rename. What it is
called there names its version, so that another version under the same name is fetched again. Downloaded files are data:
nothing in them is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scldm.api.hub.download import MODEL_FILES, fetch_from_hub, is_hub_name
from scldm.errors import CheckpointError

MLMODEL = "MLmodel"


@lru_cache
def fetch(name: str) -> Path:
    """Return a folder of this machine with the model of a name; fetched if it is not there yet.

    A process asks once for a name, so that a command uses one version of it from its plan to its end.

    Raises:
        CheckpointError: There is no such model, or its place cannot be reached.
    """
    scheme = "hf://" if is_hub_name(name) else next((s for s in _FETCH if name.startswith(s)), None)
    if scheme is None:
        raise CheckpointError(f"{name}: models are read from {', '.join(_FETCH)}, and from folders")
    try:
        return _FETCH[scheme](name)
    except CheckpointError:
        raise
    except ImportError as error:
        raise CheckpointError(f"{name}: {error.name} is not installed; pip install {error.name}") from error
    except Exception as error:  # any: of three client libraries, with errors of their own
        line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{name} cannot be fetched ({type(error).__name__}: {line[:300]})") from error


def cache_folder() -> Path:
    """Return the folder of fetched models."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SCLDM_CACHE") or f"{home}/scldm").expanduser() / "models"


def _cached(key: list[Any], download: Callable[[Path], None]) -> Path:
    """Return the folder of a version; `download` fills it if there is none."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = cache_folder() / digest[:24]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder.parent))
    try:
        download(staging)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was sooner
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


# ---- S3 ----------------------------------------------------------------------------------------------------------
def _from_s3(name: str) -> Path:
    from pyarrow import fs

    store, root = fs.FileSystem.from_uri(name)
    found = store.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = sorted((f for f in found if f.is_file and f.path.endswith(MODEL_FILES)), key=lambda f: f.path)
    if not files:
        raise CheckpointError(f"{name} holds no model: there is no .safetensors and no .json below it")
    versions = [[f.path, f.size, f.mtime_ns] for f in files]

    def download(folder: Path) -> None:
        for f in files:
            target = folder / Path(f.path).relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            with store.open_input_stream(f.path) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 22)
            if target.stat().st_size != f.size:
                raise CheckpointError(f"{name}: {f.path} ended after {target.stat().st_size} of {f.size} bytes")

    return _cached(["s3", urlsplit(name).netloc, versions], download)


# ---- the registry of MLflow --------------------------------------------------------------------------------------
def _from_registry(name: str) -> Path:
    import mlflow.artifacts
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    local = Path.cwd() / "runs" / "mlflow.db"
    if uri is None and not local.is_file():
        raise CheckpointError(
            f"{name}: export MLFLOW_TRACKING_URI, the store that holds it (looked for {local}); "
            "`scldm mlflow register` puts a model there"
        )
    uri = uri or f"sqlite:///{local}"
    client = MlflowClient(tracking_uri=uri)
    model, _, alias = name.removeprefix("models:/").partition("@")
    model, _, number = model.partition("/")
    if bool(alias) == bool(number):
        raise CheckpointError(f"{name} names no version; write models:/{model}@ALIAS or models:/{model}/NUMBER")
    version = client.get_model_version_by_alias(model, alias) if alias else client.get_model_version(model, number)

    def download(folder: Path) -> None:
        source = client.get_model_version_download_uri(model, str(version.version))
        place = mlflow.artifacts.download_artifacts(
            artifact_uri=source, dst_path=str(folder / "whole"), tracking_uri=uri
        )
        for part, source in _parts(Path(place), name).items():
            source.rename(folder / part)
        shutil.rmtree(folder / "whole")

    return _cached(["mlflow", model, str(version.version), str(version.creation_timestamp)], download)


def _parts(folder: Path, name: str) -> dict[str, Path]:
    """Return the model folders in a model of MLflow, which its description names."""
    import yaml

    about = yaml.safe_load((folder / MLMODEL).read_text())
    listed = about.get("flavors", {}).get("python_function", {}).get("artifacts", {})
    parts = {part: folder / listed[part]["path"] for part in ("vae", "flow") if part in listed}
    inside = folder.resolve()
    if "vae" not in parts or any(inside not in p.resolve().parents or not p.is_dir() for p in parts.values()):
        raise CheckpointError(f"{name} was not registered by `scldm mlflow register`: it names no VAE")
    return parts


_FETCH: dict[str, Callable[[str], Path]] = {"models:/": _from_registry, "hf://": fetch_from_hub, "s3://": _from_s3}
