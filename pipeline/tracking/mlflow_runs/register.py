"""Register models in MLflow: VAE and flow as one model with `predict(conditions) -> cells`, a VAE alone as one with
`predict(counts) -> latents`.

The cells are counts, or log1p CP10k values if the VAE has a Gaussian head; metadata, tags and description say which.

The model folders are copied as they are (safetensors and JSON) with a small file of code (`mlflow_model`) and the model
card; nothing is pickled. The same folders are registered once: registering them again moves the alias and creates no
second version.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.manifest import Manifest, read_manifest
from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.mlflow_runs.runs import experiment_id
from pipeline.tracking.provenance import read_ids
from scldm.api.folders import ModelFolders, find_models, is_remote
from scldm.data.cell_counts import LOG1P_CP10K
from scldm.data.vocabulary import Vocabulary
from scldm.errors import CheckpointError, InputError
from scldm.flow.config import SamplerConfig

if TYPE_CHECKING:
    from scldm.api.model import Model

PACKAGES = ("mlflow", "torch", "numpy", "pandas", "scipy", "pydantic", "safetensors", "numba", "anndata")
DIGEST = "scldm.models_digest"
SCALE = "scldm.scale"  # of the values that the model returns
LABEL_VALUES = "scldm.label_values"  # label -> unit, scale and range, members, or number of names with vectors
COUNTS, LATENTS = "counts", "latents"
RETURNS = {
    COUNTS: "a table of conditions in, counts (int32) out",
    LOG1P_CP10K: "a table of conditions in, log1p of counts per 10,000 (float32) out",
    LATENTS: "counts in, latents out",
}
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    aliases: tuple[str, ...]
    run_id: str
    new: bool

    def text(self) -> str:
        """Return it in words."""
        line = f"{'registered' if self.new else 'registered before'}: models:/{self.name}/{self.version}"
        aliases = "".join(f"\n  also models:/{self.name}@{a}" for a in self.aliases)
        return f"{line}{aliases}\n  of run {self.run_id or '(none: its stage was not tracked)'}"


@dataclass(frozen=True)
class NamedModels:
    """What is registered: the models that a name stands for, and the stage that made them."""

    name: str  # as it was given
    folders: ModelFolders
    stage: Manifest | None  # distil, train_flow or train_vae; None: no stage is beside the models
    title: str  # of the pipeline or the folder

    @property
    def versions(self) -> dict[str, str]:
        """Return stage -> version of what the models were made by, as far as it is recorded."""
        if self.stage is None:
            return {}
        behind = {k: v for k, v in self.stage.inputs.items() if k in ("train_vae", "train_flow")}
        return {self.stage.stage: self.stage.version, **behind}


def find(name: str) -> NamedModels:
    """Return the models that a name stands for: a folder, a pair, a stage, a pipeline, or a place elsewhere.

    Raises:
        CheckpointError: No model is there, or a required one is missing.
    """
    folders = find_models(name)
    made = folders.flow or folders.vae
    stage = read_manifest(made.parent)
    if stage is not None:
        title = Path(stage.folder).absolute().parent.parent.name
    else:
        place = Path(name).absolute()
        title = place.parent.name if place.name in ("vae", "flow") else place.name
    return NamedModels(name, folders, stage, title)


def scale_of(folders: ModelFolders) -> str:
    """Return the scale of the values that the models return: counts, log1p_cp10k, or latents of a VAE alone."""
    if folders.flow is None:
        return LATENTS
    head = json.loads((folders.vae / "config.json").read_text())["config"].get("head")
    return LOG1P_CP10K if head == "gaussian" else COUNTS


def register(folder: str | Path, *, uri: str, name: str | None = None, aliases: tuple[str, ...] = ()) -> Registered:
    """Copy the models to the store and register them.

    Args:
        folder: Name of a model: a pipeline, a stage, a folder, or a place elsewhere.
        name: Name of the registered model; default: scldm-<pipeline or folder>.
        aliases: Names that move to this version, such as champion.

    Raises:
        InputError: The models cannot be used, or the store refuses them.
    """
    from mlflow.exceptions import MlflowException

    from scldm.api.hub.model_card import model_card
    from scldm.api.parts import digests

    if name is None and is_remote(folder):
        raise InputError(f"{folder} is no folder to name the registered model after; give --name")
    models = find(str(folder))
    model = _loaded(models)
    client = mlflow_client(uri)
    model_name = name or f"scldm-{re.sub(r'[^A-Za-z0-9._-]', '-', models.title)}"
    ids = {} if models.stage is None else read_ids(Path(models.stage.folder))
    run_id = str(ids.get("run_id", "")) if ids.get("uri") == uri else ""
    digest = "-".join(d[:32] for d in digests(models.folders).values())
    try:
        with _as_default_store(uri):
            number, new = _version_of(client, model_name, digest), False
            if number is None:
                number, new = _create(client, models, model_card(model, model_name), model_name, run_id, digest), True
            for alias in aliases:
                client.set_registered_model_alias(model_name, alias, number)
    except MlflowException as error:
        raise InputError(f"{uri} refuses to register {model_name}: {str(error).splitlines()[0][:300]}") from error
    return Registered(model_name, number, aliases, run_id, new)


def _loaded(models: NamedModels) -> Model:
    """Load the models: what cannot be loaded must not be registered."""
    from scldm.api.model import load
    from scldm.flow.transport import start_problem
    from scldm.generation.decoder_condition import refuse_adaln

    try:
        model = load(models.folders.vae, flow=models.folders.flow)
        if model.flow is not None:
            refuse_adaln(model.vae.vae.config, "a registered model")
            if problem := start_problem(model.flow.start, "noise"):
                raise ValueError(f"a registered model generates cells from noise: {problem}")
        return model
    except (CheckpointError, ValueError, OSError) as error:
        raise InputError(f"these models cannot be used and are not registered: {error}") from error


def _version_of(client: Any, name: str, digest: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}'")
    return next((str(v.version) for v in found if v.tags.get(DIGEST) == digest), None)


def _create(client: Any, models: NamedModels, card: str, name: str, run_id: str, digest: str) -> str:
    """Log a model with its files, and create a version of the registered model that points to it."""
    experiment = client.get_run(run_id).info.experiment_id if run_id else _own_experiment(client, models)
    made_by = {f"scldm.{stage}_version": version for stage, version in models.versions.items()}
    scale, place = scale_of(models.folders), models.name if models.stage is None else models.stage.folder
    tags = {DIGEST: digest, SCALE: scale, **made_by, "scldm.output_uri": place}
    logged = client.create_logged_model(
        experiment, name=name, source_run_id=run_id or None, tags=tags, model_type="scldm", params=models.versions,
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="scldm-model-") as scratch:
            folder = Path(scratch) / "model"
            save(models.folders, folder, model_id=logged.model_id, run_id=run_id or None)
            (folder / "README.md").write_text(card)
            client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    if not client.search_registered_models(f"name = '{name}'"):
        what = "counts in, latents out" if models.folders.flow is None else "a table of conditions in, cells out"
        client.create_registered_model(name, description=f"scLDM: {what}. README.md of a version is its model card.")
    version = client.create_model_version(
        name, source=logged.artifact_location, run_id=run_id or None, model_id=logged.model_id, tags=tags,
        description=f"scLDM: {RETURNS[scale]}.",
    )  # fmt: skip
    return str(version.version)


@contextmanager
def _as_default_store(uri: str) -> Iterator[None]:
    """Make a store MLflow's own default: its registry looks there for the model that a version is made of."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # where MLflow keeps the default, for its child processes too
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # None unsets it


def _own_experiment(client: Any, models: NamedModels) -> str:
    """Return the pipeline's experiment, for models whose run this store does not have."""
    uri = str(client.tracking_uri)
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if uri.startswith("sqlite:///") else None
    return experiment_id(client, f"scldm/{models.title}", artifacts)


def save(models: ModelFolders, folder: Path, *, model_id: str | None = None, run_id: str | None = None) -> None:
    """Write the models as one model folder in MLflow's format.

    Args:
        folder: Must not exist; the code is copied to a folder next to it.
        model_id: Id of the logged model.
        run_id: Run that made it.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    vocabulary = Vocabulary.load(models.vae / "vocabulary.json")
    code = folder.parent / "code"
    for package in ("scldm", "pipeline"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    # No input example: MLflow would run it once, and the vocabulary in the model names the classes.
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(ROOT / "pipeline" / "inference" / "export" / "mlflow_model.py"),
        artifacts={"vae": str(models.vae)} | ({} if models.flow is None else {"flow": str(models.flow)}),
        code_paths=[str(code / "scldm"), str(code / "pipeline")],
        signature=signature(scale_of(models), vocabulary.n_genes),
        metadata={SCALE: scale_of(models), "scldm.returns": RETURNS[scale_of(models)], **_label_values(vocabulary)},
        pip_requirements=[f"{p}=={installed(p).partition('+')[0]}" for p in PACKAGES],
        mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
    )


def _label_values(vocabulary: Vocabulary) -> dict[str, dict[str, str]]:
    """Return what labels mean whose classes are values, as metadata; none if there are no such labels."""
    found = {label: values.summary() for label, values in vocabulary.values.items()}
    return {LABEL_VALUES: found} if found else {}


def signature(scale: str, n_genes: int) -> Any:
    """Return the signature: settings of the sampler, no columns of the input, and the type of the cells.

    MLflow drops columns that a signature does not list before the model sees them, and refuses numbers and categories
    for text. The model reads its table itself: every part of it is read or refused by name.

    Args:
        scale: Of the values that the model returns: int32 counts, or float32 log1p_cp10k. None is returned for latents:
            a VAE alone has no settings.
        n_genes: Number of values of a cell.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    if scale == LATENTS:
        return None
    defaults = SamplerConfig()
    params = [
        ParamSpec("seed", DataType.long, 0), ParamSpec("guidance", DataType.double, 1.0),
        ParamSpec("steps", DataType.long, defaults.steps),
        ParamSpec("temperature", DataType.double, defaults.temperature),
    ]  # fmt: skip
    cells = TensorSpec(np.dtype("int32" if scale == COUNTS else "float32"), (-1, n_genes))
    return ModelSignature(inputs=None, outputs=Schema([cells]), params=ParamSchema(params))
