"""Settings of jobs that send real cells through trained models: embed, reconstruct, perturb, log_likelihood."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pipeline.config.ingest import CellsConfig, ClassName, Source
from pipeline.config.input_paths import FlowName, VaeName
from scldm.config import StrictModel
from scldm.flow.config import Solver
from scldm.nn.kernels.precision import Precision


class ModelNames(StrictModel):
    """Models by name: a folder, a stage or a pipeline (runs/demo), models:/NAME@ALIAS, hf://ORG/NAME@REVISION, s3://….

    One name in place of this section stands for both.
    """

    vae: VaeName
    """The VAE."""
    flow: FlowName | None = None
    """The flow; only for jobs that use one: generate, perturb, and log_likelihood with `flow`."""


class ModelGenesConfig(StrictModel):
    """How genes of the model are found in the source."""

    match: Literal["id", "symbol"] = "id"
    """By id (the version in ENSG….12 does not count), or by feature_name."""
    max_missing: float = Field(0.2, ge=0, le=1)
    """Largest share of the model's genes that the source may lack."""


class ScoredGenesConfig(ModelGenesConfig):
    """How genes are found, for jobs that decode or score genes."""

    presence: bool = False
    """Whether a gene that a cell's data set did not measure is left out of its likelihood, as in ingest. False treats
    it as a zero."""


class FlowConfig(StrictModel):
    """How the flow is integrated, and with which weights."""

    solver: Solver = "midpoint"
    """ODE solver, as generate.sampler.solver."""
    steps: PositiveInt = 20
    """Steps of a fixed-step solver."""
    rtol: PositiveFloat = 1e-5
    """Relative tolerance of dopri5."""
    atol: PositiveFloat = 1e-5
    """Absolute tolerance of dopri5."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or raw weights of the DiT."""


class RealCellsConfig(StrictModel):
    """Cells of a source, in its order, written to shards."""

    source: Source
    """The source of cells, as in ingest."""
    cells: CellsConfig = CellsConfig()
    """Which cells, as in ingest."""
    obs_filter: str | None = None
    """SOMA value filter on obs, for what `cells` cannot say."""
    keep_obs: list[str] = []
    """obs columns that are copied to the output; the labels of the model always are."""
    genes: ModelGenesConfig = ModelGenesConfig()
    model: ModelNames | None = None
    """Models by name, from anywhere: runs/census, or {vae: …, flow: …}; null: those that this pipeline trained."""
    empty_cells: Literal["error", "drop"] = "error"
    """What to do with cells that express none of the model's genes. drop leaves them out and reports how many."""
    max_genes: PositiveInt | None = None
    """Maximum number of expressed genes of a cell that the encoder sees, drawn by seed and soma_joinid; null: all of
    them. The likelihood always scores all."""
    shard_size: int = Field(25_000, ge=1, le=250_000)
    """Cells per file."""
    batch_size: PositiveInt = 2048
    """Cells that an actor reads at a time. Affects memory, never results: the networks see tiles of 32 cells (up to
    1,024 on a GPU), cut by the cells' position in the shard."""
    precision: Precision | None = None
    """Precision of the networks' products: fp32, tf32 or bf16. Softmax over genes, likelihood, dispersion and the
    solver's state are fp32 in each. Null: by device, fp32 on a CPU, bf16 on a GPU that has it (else tf32, else fp32),
    and fp32 for the solver dopri5. The output says which; a job that goes on keeps the one that it began with."""

    @property
    def uses_flow(self) -> bool:
        return False

    @property
    def solver(self) -> Solver | None:
        """The solver of the flow; None if none is integrated."""
        flow: FlowConfig | None = getattr(self, "flow", None)
        return flow.solver if flow is not None and self.uses_flow else None

    @property
    def uses_labels(self) -> bool:
        """Whether the flow is conditioned on the cells' labels."""
        return False

    @model_validator(mode="after")
    def _has_the_models_that_it_uses(self) -> RealCellsConfig:
        if self.model is None:
            return self
        if self.uses_flow and self.model.flow is None:
            raise ValueError("model has no flow, and this job uses one: give model.flow")
        if not self.uses_flow and self.model.flow is not None:
            raise ValueError(f"model.flow ({self.model.flow}) is not used by this job; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before this setting existed."""
        return {k: v for k, v in to_dict(self).items() if (k, v) != ("precision", None)}


class EmbedConfig(RealCellsConfig):
    """Latents of real cells."""


class ReconstructConfig(RealCellsConfig):
    """Real cells, encoded and decoded."""

    genes: ScoredGenesConfig = ScoredGenesConfig()
    decode: Literal["counts", "mean", "both"] = "counts"
    """counts: a draw from the decoder's distribution, in X. mean: its mean, dense, in layers["mean"]. both: both."""


class UnknownLabelsConfig(RealCellsConfig):
    """A job that may use the labels of its cells."""

    unknown_labels: Literal["error", "none"] = "error"
    """What to do with cells whose label is missing or is not a class of the model. none: use them without that
    label."""


class PerturbConfig(UnknownLabelsConfig):
    """Real cells under another condition."""

    to: dict[str, ClassName | None] = Field(min_length=1)
    """Labels that change and their new classes: {cytokine: IFN-beta}; null removes a label. Other labels stay as they
    are."""
    method: Literal["flow", "pooled", "shift"] = "flow"
    """flow: by the models, as `start` says. shift: the mean change of the other contexts, learned from the training
    cells of this pipeline's ingest and drawn as counts; uses no model. It is what anybody has for free. pooled: each
    cell changes as the flow says, in its own counts, and the mean change of a gene is a weighted average of the flow's
    and of three that the other contexts give; weights are learned from measured combinations. For combinations that no
    training cell has."""
    start: Literal["latents", "noise", "control"] = "latents"
    """latents: integrate the flow backwards from the cell's latents, under its own labels and without guidance, to the
    noise that they correspond to, and forwards under the new labels. noise: forwards from new noise; only the labels
    and the library size of the cell are used. control: forwards from the cell's latents, by a flow that was trained
    from control cells (train_flow.start); the cells must be control cells, and `to` names their label alone."""
    counts: Literal["drawn", "changed"] = "drawn"
    """drawn: from the decoder's distribution under the new labels. changed: the cell's own counts, to which molecules
    are added, or of which they are lost one by one, as the decoder's means change from the cell's latents to the new
    ones; the library size follows."""
    flow: FlowConfig = FlowConfig()
    guidance: dict[str, float] | float = 1.0
    """Guidance of the forward integration, as generate.sampler.guidance."""

    @property
    def uses_flow(self) -> bool:
        return self.method != "shift"

    @property
    def uses_labels(self) -> bool:
        return True

    @model_validator(mode="after")
    def _a_shift_uses_no_model(self) -> PerturbConfig:
        if self.method == "flow":
            return self
        of_models = ("model", "start", "counts", "flow", "guidance", "max_genes", "unknown_labels", "precision")
        set_ = [x for x in of_models if getattr(self, x) != type(self).model_fields[x].default]
        if set_ and self.method == "shift":
            raise ValueError(f"{', '.join(set_)} cannot be set with method: shift, which uses no model; leave it out")
        if removed := [name for name, value in self.to.items() if value is None]:
            raise ValueError(f"to.{removed[0]} is null, and method: {self.method} needs a class to shift to; name one")
        return self

    @model_validator(mode="after")
    def _pools_changes_of_labelled_cells(self) -> PerturbConfig:
        if self.method != "pooled":
            return self
        if self.start == "noise":
            raise ValueError(
                "start (noise) uses none of a cell's counts, and method: pooled changes them; set start=latents"
            )
        if "counts" in self.model_fields_set and self.counts == "drawn":
            raise ValueError("method: pooled changes a cell's own counts; leave counts (drawn) out")
        if self.unknown_labels != "error":
            raise ValueError("unknown_labels (none) uses cells without labels, and method: pooled needs theirs")
        return self

    @model_validator(mode="after")
    def _reads_genes_if_it_limits_them(self) -> PerturbConfig:
        if self.start == "noise" and self.max_genes is not None:
            raise ValueError(f"max_genes ({self.max_genes}) is of the encoder, and start: noise encodes nothing")
        return self

    @model_validator(mode="after")
    def _changes_counts_of_encoded_cells(self) -> PerturbConfig:
        if self.start == "noise" and self.counts == "changed":
            raise ValueError(
                "counts (changed) changes a cell's counts by what its latents change, and start (noise) uses none of "
                "the cell's; set counts=drawn or start=latents"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before these settings existed."""
        new = (("method", "flow"), ("counts", "drawn"), ("precision", None))
        return {k: v for k, v in to_dict(self).items() if (k, v) not in new}


class FlowLikelihoodConfig(FlowConfig):
    """Log-likelihood of a cell's latents under the flow, by its ODE."""

    labels: Literal["own", "none"] = "own"
    """Condition on the cell's own labels, or on none."""
    probes: PositiveInt = 1
    """Random probes of the divergence that are averaged. The error falls with their square root, the cost grows
    linearly."""


class LogLikelihoodConfig(UnknownLabelsConfig):
    """How likely real cells are under the models."""

    genes: ScoredGenesConfig = ScoredGenesConfig()
    flow: FlowLikelihoodConfig | None = None
    """The flow's log-likelihood of the latents; null: only the VAE's likelihood of the counts."""

    @property
    def uses_flow(self) -> bool:
        return self.flow is not None

    @property
    def uses_labels(self) -> bool:
        return self.flow is not None and self.flow.labels == "own"

    @model_validator(mode="after")
    def _asks_for_labels_if_it_judges_them(self) -> LogLikelihoodConfig:
        if self.unknown_labels != "error" and not self.uses_labels:
            raise ValueError(
                f"unknown_labels ({self.unknown_labels}) is of the flow's likelihood under the cells' own labels "
                "(flow.labels: own), which this job does not ask for; leave it out"
            )
        return self
