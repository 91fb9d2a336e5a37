"""Register a pipeline's models in MLflow: VAE and flow as one model with `predict(conditions) -> cells`.

The cells are counts, or log1p CP10k values if the VAE has a Gaussian head; metadata, tags and description say which.

The model folders are copied as they are (safetensors and JSON) with a small file of code (`predictor`); nothing is
pickled. The same folders are registered once: registering them again moves the alias and creates no second version.
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
from typing import Any

from pipeline.core.manifest import Manifest, newest_manifest, read_manifest
from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.mlflow_runs.runs import experiment_id
from pipeline.tracking.provenance import read_ids
from scldm.data.cell_counts import LOG1P_CP10K
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.flow.config import SamplerConfig

PACKAGES = ("mlflow", "torch", "numpy", "pandas", "scipy", "pydantic", "safetensors", "numba")
DIGEST = "scldm.models_digest"
SCALE = "scldm.scale"  # of the values that the model returns
COUNTS = "counts"
RETURNS = {COUNTS: "counts (int32)", LOG1P_CP10K: "log1p of counts per 10,000 (float32)"}
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
class ModelFolders:
    """The model folders that are registered, and the stage that made them."""

    vae: Path
    flow: Path
    stage: Manifest  # train_flow

    @property
    def scale(self) -> str:
        """Scale of the values that the models make: counts, or log1p_cp10k."""
        head = json.loads((self.vae / "config.json").read_text())["config"].get("head")
        return LOG1P_CP10K if head == "gaussian" else COUNTS

    @property
    def n_genes(self) -> int:
        """Number of genes that a cell has."""
        return Vocabulary.load(self.vae / "vocabulary.json").n_genes

    @property
    def pipeline(self) -> str:
        """Name of the pipeline."""
        return Path(self.stage.folder).parent.parent.name


def find_models(folder: Path) -> ModelFolders:
    """Return the models of a pipeline's newest train_flow, or of the train_flow whose folder is given.

    Raises:
        InputError: There is none, or the VAE that it was trained on is missing.
    """
    folder = folder.absolute()
    stage = read_manifest(folder) or newest_manifest(folder, "train_flow")
    if stage is None or stage.stage != "train_flow":
        found = "no finished train_flow" if stage is None else f"a {stage.stage}"
        raise InputError(f"{folder} holds {found}; give a pipeline (runs/demo) or runs/demo/train_flow/<version>")
    if (own := stage.facts.get("vae")) is not None:  # trained together with its VAE
        return ModelFolders(Path(stage.folder) / own["ema"], stage.path("model"), stage)
    location = Path(stage.folder).parent.parent / "train_vae" / stage.inputs["train_vae"]
    vae = read_manifest(location)
    if vae is None:
        raise InputError(
            f"the VAE that this flow was trained on is not in {location}; put it back there, or train the flow again"
        )
    return ModelFolders(vae.path("model"), stage.path("model"), stage)


def register(folder: Path, *, uri: str, name: str | None = None, aliases: tuple[str, ...] = ()) -> Registered:
    """Copy the models to the store and register them.

    Args:
        folder: A pipeline or a train_flow.
        name: Name of the registered model; default: scldm-<pipeline>.
        aliases: Names that move to this version, such as champion.

    Raises:
        InputError: The models cannot be used, or the store refuses them.
    """
    from mlflow.exceptions import MlflowException

    models = find_models(folder)
    client = mlflow_client(uri)
    model_name = name or f"scldm-{re.sub(r'[^A-Za-z0-9._-]', '-', models.pipeline)}"
    ids = read_ids(Path(models.stage.folder))
    run_id = str(ids.get("run_id", "")) if ids.get("uri") == uri else ""
    digest = _digest(models)
    try:
        with _as_default_store(uri):
            number, new = _version_of(client, model_name, digest), False
            if number is None:
                number, new = _create(client, models, model_name, run_id, digest), True
            for alias in aliases:
                client.set_registered_model_alias(model_name, alias, number)
    except MlflowException as error:
        raise InputError(f"{uri} refuses to register {model_name}: {str(error).splitlines()[0][:300]}") from error
    return Registered(model_name, number, aliases, run_id, new)


def _digest(models: ModelFolders) -> str:
    from scldm.checkpoints.native import folder_digest, load_flow, load_vae
    from scldm.errors import CheckpointError

    try:  # a model that cannot be loaded must not be registered
        from scldm.generation.cell_maker import check_pair
        from scldm.generation.decoder_condition import refuse_adaln

        vae = load_vae(models.vae)
        check_pair(vae, load_flow(models.flow))
        refuse_adaln(vae.vae.config, "a registered model")
    except (CheckpointError, ValueError, OSError) as error:
        raise InputError(f"these models cannot be used and are not registered: {error}") from error
    return f"{folder_digest(models.vae)[:32]}-{folder_digest(models.flow)[:32]}"


def _version_of(client: Any, name: str, digest: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}'")
    return next((str(v.version) for v in found if v.tags.get(DIGEST) == digest), None)


def _create(client: Any, models: ModelFolders, name: str, run_id: str, digest: str) -> str:
    """Log a model with its files, and create a version of the registered model that points to it."""
    experiment = client.get_run(run_id).info.experiment_id if run_id else _own_experiment(client, models)
    tags = {
        DIGEST: digest, SCALE: models.scale, "scldm.train_flow_version": models.stage.version,
        "scldm.output_uri": models.stage.folder,
    }  # fmt: skip
    logged = client.create_logged_model(
        experiment, name=name, source_run_id=run_id or None, tags=tags, model_type="scldm",
        params={"train_flow": models.stage.version, "train_vae": models.stage.inputs["train_vae"]},
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="scldm-model-") as scratch:
            save(models, Path(scratch) / "model", model_id=logged.model_id, run_id=run_id or None)
            client.log_model_artifacts(logged.model_id, str(Path(scratch) / "model"))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="scLDM: a table of conditions in, cells out.")
    version = client.create_model_version(
        name, source=logged.artifact_location, run_id=run_id or None, model_id=logged.model_id, tags=tags,
        description=f"A table of conditions in, {RETURNS[models.scale]} out.",
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


def _own_experiment(client: Any, models: ModelFolders) -> str:
    """Return the pipeline's experiment, for models whose run this store does not have."""
    uri = str(client.tracking_uri)
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if uri.startswith("sqlite:///") else None
    return experiment_id(client, f"scldm/{models.pipeline}", artifacts)


def save(models: ModelFolders, folder: Path, *, model_id: str | None = None, run_id: str | None = None) -> None:
    """Write the models as one model folder in MLflow's format.

    Args:
        folder: Must not exist; the code is copied to a folder next to it.
        model_id: Id of the logged model.
        run_id: Run that made it.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    code = folder.parent / "code"
    for package in ("scldm", "pipeline"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    # No input example: MLflow would run it once, and the vocabulary in the model names the classes.
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(ROOT / "pipeline" / "inference" / "export" / "mlflow_model.py"),
        artifacts={"vae": str(models.vae), "flow": str(models.flow)},
        code_paths=[str(code / "scldm"), str(code / "pipeline")],
        signature=signature(models.scale, models.n_genes),
        metadata={SCALE: models.scale, "scldm.returns": RETURNS[models.scale]},
        pip_requirements=[f"{p}=={installed(p).partition('+')[0]}" for p in PACKAGES],
        mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
    )


def signature(scale: str, n_genes: int) -> Any:
    """Return the signature: settings of the sampler, no columns of the input, and the type of the cells.

    MLflow drops columns that a signature does not list before the model sees them, and refuses numbers and categories
    for text. The model reads its table itself: every part of it is read or refused by name.

    Args:
        scale: Of the values that the model returns: int32 counts, or float32 log1p_cp10k.
        n_genes: Number of values of a cell.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    defaults = SamplerConfig()
    params = [
        ParamSpec("seed", DataType.long, 0), ParamSpec("guidance", DataType.double, 1.0),
        ParamSpec("steps", DataType.long, defaults.steps),
        ParamSpec("temperature", DataType.double, defaults.temperature),
    ]  # fmt: skip
    cells = TensorSpec(np.dtype("int32" if scale == COUNTS else "float32"), (-1, n_genes))
    return ModelSignature(inputs=None, outputs=Schema([cells]), params=ParamSchema(params))
