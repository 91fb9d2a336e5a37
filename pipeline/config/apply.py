"""What a job may say that sends real cells through trained models: embed, reconstruct, perturb, log_likelihood."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.config.ingest import CellsConfig, Source
from pipeline.config.input_paths import FlowFolder, VaeFolder
from scldm.config import StrictModel
from scldm.flow.config import Solver


class ModelFolders(StrictModel):
    """Model folders, as training leaves them in `model/` and as `scldm convert` writes them."""

    vae: VaeFolder
    """Model folder of a VAE."""
    flow: FlowFolder | None = None
    """Only for a job that uses one: perturb, and log_likelihood with `flow`."""


class ModelGenesConfig(StrictModel):
    """How genes of the model are found in the source."""

    match: Literal["id", "symbol"] = "id"
    """By id (the version in ENSG….12 does not count), or by feature_name."""
    max_missing: float = Field(0.2, ge=0, le=1)
    """Largest share of the model's genes that the source may lack."""


class ScoredGenesConfig(ModelGenesConfig):
    """The same, where genes are decoded or scored beside the cell's own counts."""

    presence: bool = False
    """Whether a gene that a cell's data set did not measure is left out of its likelihood, as in ingest. False takes it
    as a zero."""


class FlowConfig(StrictModel):
    """How the flow is integrated, and with which weights."""

    solver: Solver = "midpoint"
    """ODE solver, as generate.sampler.solver."""
    steps: PositiveInt = 20
    """Of a fixed-step solver."""
    rtol: PositiveFloat = 1e-5
    """Relative tolerance of dopri5."""
    atol: PositiveFloat = 1e-5
    """Absolute tolerance of dopri5."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or raw weights of the DiT."""


class RealCellsConfig(StrictModel):
    """Rows of a source, in its order, into shards."""

    source: Source
    """Where the cells are; as in ingest."""
    cells: CellsConfig = CellsConfig()
    """Which of them; as in ingest."""
    obs_filter: str | None = None
    """SOMA value filter on obs, for what `cells` cannot say."""
    keep_obs: list[str] = []
    """obs columns that go into the output as they are; columns that are labels of the model always do."""
    genes: ModelGenesConfig = ModelGenesConfig()
    model: ModelFolders | None = None
    """Folders of models; null takes those that this pipeline trained."""
    empty_cells: Literal["error", "drop"] = "error"
    """What to do with cells that express none of the model's genes. drop leaves their rows out, and says how many."""
    max_genes: PositiveInt | None = None
    """Most expressed genes of a cell that the encoder is shown, drawn by seed and soma_joinid; null: all of them. The
    likelihood always scores all."""
    shard_size: int = Field(25_000, ge=1, le=250_000)
    """Cells of a file."""
    batch_size: PositiveInt = 2048
    """Cells that an actor has read at once. It decides memory, never a number: the networks see tiles of 32 cells (up
    to 1,024 on a GPU), cut by the cells' place in the shard."""

    @property
    def uses_flow(self) -> bool:
        return False

    @property
    def uses_labels(self) -> bool:
        """Whether the labels of the cells go into the flow."""
        return False

    @model_validator(mode="after")
    def _has_the_models_that_it_uses(self) -> RealCellsConfig:
        if self.model is None:
            return self
        if self.uses_flow and self.model.flow is None:
            raise ValueError("model has no flow, and this job uses one: give model.flow, the folder of a flow")
        if not self.uses_flow and self.model.flow is not None:
            raise ValueError(f"model.flow ({self.model.flow}) is not used by this job; leave it out")
        return self


class EmbedConfig(RealCellsConfig):
    """Latents of real cells."""


class ReconstructConfig(RealCellsConfig):
    """Real cells, encoded and decoded."""

    genes: ScoredGenesConfig = ScoredGenesConfig()
    decode: Literal["counts", "mean", "both"] = "counts"
    """counts: a draw from the decoder's distribution, in X. mean: its mean, in layers["mean"], dense. Or both."""


class UnknownLabelsConfig(RealCellsConfig):
    """A job that may use the labels of its cells."""

    unknown_labels: Literal["error", "none"] = "error"
    """What to do with cells whose label is missing or no class of the model. none: they go without that label."""


class PerturbConfig(UnknownLabelsConfig):
    """Real cells under another condition."""

    to: dict[str, str | None] = Field(min_length=1)
    """Labels that change, and to what: {cytokine: IFN-beta}; null takes the label away. The others stay the cell's."""
    start: Literal["latents", "noise"] = "latents"
    """latents: the flow is run backwards from the cell's latents, under its own labels and without guidance, to the
    noise that they come from, and forwards under the new ones. noise: forwards from fresh noise; of the cell itself
    only labels and library size are used."""
    flow: FlowConfig = FlowConfig()
    guidance: dict[str, float] | float = 1.0
    """Of the way forwards, as generate.sampler.guidance."""

    @property
    def uses_flow(self) -> bool:
        return True

    @property
    def uses_labels(self) -> bool:
        return True

    @model_validator(mode="after")
    def _reads_genes_if_it_limits_them(self) -> PerturbConfig:
        if self.start == "noise" and self.max_genes is not None:
            raise ValueError(f"max_genes ({self.max_genes}) is of the encoder, and start: noise encodes nothing")
        return self


class FlowLikelihoodConfig(FlowConfig):
    """Log-likelihood of a cell's latents under the flow, by its ODE."""

    labels: Literal["own", "none"] = "own"
    """Under the cell's own labels, or under none."""
    probes: PositiveInt = 1
    """Random probes of the divergence that are averaged: the error falls as one over their root, the cost grows."""


class LogLikelihoodConfig(UnknownLabelsConfig):
    """How likely real cells are under the models."""

    genes: ScoredGenesConfig = ScoredGenesConfig()
    flow: FlowLikelihoodConfig | None = None
    """null: only the VAE's likelihood of the counts."""

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
