"""The model in a notebook: AnnData in, AnnData out.

    model = scldm.load("runs/demo")
    model.encode(adata)                                             # obsm["X_scldm"]
    cells = model.generate({"cell_type": "B cell"}, n=500, seed=0)  # AnnData
    scldm.score(cells, real=adata, label="cell_type")

Networks, tiles and counters are those of the batch jobs: with equal models, sampler, seed and request the cells equal
those of `scldm run jobs/generate.yaml`, bit for bit (on the same processor with as many threads). The randomness of a
real cell is a function of (seed, its row); in a job on the same `.h5ad`, the row is the soma_joinid.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import anndata
import pandas as pd
import torch

from scldm.api.arguments import Arguments
from scldm.api.folders import ModelFolders, Weights, find_models
from scldm.api.hub.local_or_hub import pretrained_folder
from scldm.api.methods.analyses import Analyses
from scldm.checkpoints.native import load_flow, load_vae
from scldm.errors import CheckpointError
from scldm.generation.cell_maker import check_pair
from scldm.nn.kernels.precision import PRECISIONS, Precision, PrecisionError, resolve

if TYPE_CHECKING:
    from scldm.api.training_run import Report


def load(
    folder: str | Path,
    *,
    flow: str | Path | None = None,
    weights: Weights = "ema",
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
) -> Model:
    """Load the models of a folder.

    Args:
        folder: A model folder, a folder with vae/ and flow/, a finished stage, or a pipeline (its newest flow).
        flow: Model folder of a flow, if it is not in the VAE's folder.
        weights: "ema", the averaged weights of the flow, or "raw".
        device: For example "cuda"; "auto": a GPU if there is one.
        precision: Of the networks' products: "fp32", "tf32" or "bf16". None: by device, fp32 on a CPU, bf16 on a GPU
            that has it (else tf32, else fp32), and fp32 for the solver dopri5. `uns["scldm"]` says which it was.

    Raises:
        CheckpointError: No model is there, or VAE and flow do not belong together.
        ArgumentError: An argument cannot be used, or the device does not have the precision; all are listed.

    >>> model = load(folder)
    >>> model
    scldm.Model: VAE of 6 genes, 3 x 4 latents; flow with labels cell_type (3), donor (2); on cpu
    """
    given = Arguments()
    given.one_of("weights", weights, get_args(Weights))
    given.path("folder", folder)
    if flow is not None:
        given.path("flow", flow)
    device = given.device("device", device)
    if precision is not None:
        given.one_of("precision", precision, PRECISIONS)
    if not given.problems:
        try:
            resolve(precision, device)
        except PrecisionError as error:
            given.problems.append(str(error))
    given.raise_problems()
    found = find_models(folder, weights=weights)
    if flow is not None:
        found = ModelFolders(found.vae, Path(flow).expanduser())
    vae = load_vae(found.vae, device=device)
    pair = None if found.flow is None else load_flow(found.flow, weights=weights, device=device)
    if pair is not None:
        try:
            check_pair(vae, pair)
        except ValueError as error:
            raise CheckpointError(f"{found.vae} and {found.flow}: {error}") from error
    return Model(vae, pair, found, weights, precision)


class Model(Analyses):
    """A VAE and, optionally, the flow on its latents. Created by `scldm.load`.

    Its methods are in `scldm.api.methods`: of real cells, of analyses, of generated cells; here are those of its
    training and of its folder.
    """

    def __repr__(self) -> str:
        m, e = self.latent_shape
        labels = ", ".join(f"{k} ({len(v)})" for k, v in self.labels.items()) or "none"
        flow = f"flow with labels {labels}" if self.flow is not None else "no flow"
        where = f"on {self.device}" + ("" if self.precision == "fp32" else f" in {self.precision}")
        return f"scldm.Model: VAE of {self.vocabulary.n_genes:,} genes, {m} x {e} latents; {flow}; {where}"

    def finetune(
        self, adata: anndata.AnnData | str | Path, labels: Sequence[str] | str | None = None, *,
        name: str | None = None, output: str | Path = "runs", keep_vae: bool = False, lora: int | None = None,
        freeze: Sequence[str] = (), settings: Mapping[str, Any] | Sequence[str] | None = None, **options: Any,
    ) -> Model:  # fmt: skip
        """Train on from this model on other cells, over its genes; return the new model. This one stays as it is.

        It is `scldm.train(adata, labels, start_from=…)`: the job that is written as output/name/job.yaml has
        `train_vae.start_from`, `train_flow.start_from` and `ingest.genes.vocabulary`, and `scldm run` does the same.
        Classes are matched by name; a new one starts at the null class.

        Args:
            adata: Cells with raw counts, or their path, as `scldm.train` takes them.
            labels: obs columns; None: those of this model that the cells have (of a path: all of them).
            name: Of the new pipeline; None: that of this model, and -tuned.
            keep_vae: Use the VAE as it is, and train the flow alone.
            lora: Rank of adapters that are trained in place of all weights.
            freeze: Beginnings of names of the VAE's parameters that stay as they are, for example ["encoder"].
            settings: What is changed of the job. Other options (seed, gpus, layer, …) as in `scldm.train`.

        Raises:
            ArgumentError: Arguments cannot be used.
            AttributeError: The pipeline, which trains, is not installed.
        """
        import scldm
        from scldm.api.training_run import name_to_tune, start_of

        start = start_of(self.folders, self.weights, {"keep_vae": keep_vae, "lora": lora, "freeze": freeze})
        own = list(self.labels) if self.flow is not None else []
        if labels is None:
            labels = [x for x in own if not isinstance(adata, anndata.AnnData) or x in adata.obs] or None
        name = name_to_tune(self.folders) if name is None else name
        tuned: Model = scldm.train(
            adata, labels, name=name, output=output, settings=settings, start_from=start, **options
        )
        return tuned

    @property
    def history(self) -> pd.DataFrame:
        """Metrics of the trainings of its VAE and flow, indexed by stage and step.

        Raises:
            CheckpointError: The model is not in the folder of the pipeline that trained it.
        """
        from scldm.api.training_run import history

        return history(self.folders)

    def report(self) -> Report:
        """Return the newest report of its cells, which a notebook shows.

        Raises:
            CheckpointError: Its cells were not evaluated.
        """
        from scldm.api.training_run import newest_report

        return newest_report(self.folders)

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write a folder in Hugging Face's layout: README.md (the model card), vae/ and, if there is one, flow/.

        Args:
            force: Replace a folder that this method wrote before. Other folders are never replaced.

        >>> again = Model.from_pretrained(model.save_pretrained(tmp / "mine"))
        >>> again.labels == model.labels
        True
        """
        from scldm.api.hub.pretrained import write_pretrained

        return write_pretrained(self, Path(folder).expanduser(), force=force, in_python=True)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu",
        precision: Precision | None = None, token: str | bool | None = None,
    ) -> Model:  # fmt: skip
        """Load a model of the Hugging Face hub, or of a local folder that `save_pretrained` or `scldm convert` wrote.

        The hub is asked if a revision is given, if the name begins with hf:// or has the form org/name@revision, or if
        it has the form org/name and there is no folder of that name. Everything else is a folder.

        Args:
            name: "org/name", or a folder.
            revision: Branch, tag or commit of the hub; None: its main branch. `uns["scldm"]["source"]` of cells names
                the commit.
            token: Of an account that may read the repository; None: the one that `hf auth login` stored.
            device: As in `scldm.load`, and so is precision.

        Raises:
            CheckpointError: There is no such model, a file is damaged, or a folder of that name holds no model.
        """
        return load(pretrained_folder(name, revision, token), device=device, precision=precision)

    def push_to_hub(
        self, repository: str, *, revision: str | None = None, private: bool | None = None,
        token: str | bool | None = None, commit_message: str | None = None,
    ) -> str:  # fmt: skip
        """Upload the folder of `save_pretrained` to the Hugging Face hub, as one commit.

        The card of an earlier upload is replaced, but for the licence in its head. Parts that this model does not have
        are removed; a repository that holds something else is refused.

        Args:
            repository: "org/name", or "user/name"; made if it is not there.
            revision: Branch to write to, made if it is not there; None: the main branch.
            private: Whether a new repository is private; None: as the organisation does it.
            token: Of an account that may write there; None: the one that `hf auth login` stored, or HF_TOKEN.
            commit_message: None: "Upload a model of scldm".

        Returns:
            The name with the commit, hf://org/name@<commit>, which `scldm.load` and jobs take.

        Raises:
            ArgumentError: Arguments cannot be used; all are listed.
            CheckpointError: The repository holds something else, or the hub refuses; nothing was committed.
            ModuleNotFoundError: `huggingface_hub` is not installed.
        """
        from scldm.api.hub.push import push

        return push(self, repository, revision=revision, private=private, token=token, commit_message=commit_message)
