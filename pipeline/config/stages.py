"""What a job file may say of a stage behind ingest: its section, or the top level of its own job file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.config.input_paths import ConditionsTable, GeneFile
from pipeline.config.train import FlowTrainConfig, VaeTrainConfig
from scldm.config import StrictModel
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.nn.config import DiTConfig, VAEConfig


class TrainVaeConfig(StrictModel):
    """The VAE: its sizes, and how it is trained."""

    model: VAEConfig = VAEConfig()
    train: VaeTrainConfig = VaeTrainConfig()

    @model_validator(mode="after")
    def _decoder_needs_no_condition(self) -> TrainVaeConfig:
        if self.model.adaln:
            raise ValueError(
                "model.adaln (true) needs a condition vector per cell, which this stage has none of: false"
            )
        return self


class EncodeConfig(StrictModel):
    """The latent cache that the flow is trained on."""

    batch_size: PositiveInt = 256
    """Cells that an actor encodes at once."""
    splits: list[Literal["train", "validation", "test"]] = ["train", "validation"]
    """Splits that are encoded."""


class JointVaeConfig(StrictModel):
    """Whether the VAE is trained on, together with the flow."""

    train: bool = False
    """true streams counts instead of reading the latent cache, with the encoder in the graph; the stage then needs no
    encode, and exports both networks. generate and evaluate take this VAE."""
    weight: PositiveFloat = 1.0
    """Of the VAE's negative log-likelihood (nats per cell) beside the flow's loss (mean square of a latent)."""
    genes_per_step: PositiveInt | None = None
    """Genes scored in a training step, as train_vae.train.genes_per_step."""

    @model_validator(mode="after")
    def _is_of_a_joint_training(self) -> JointVaeConfig:
        given = [f for f in ("weight", "genes_per_step") if getattr(self, f) != JointVaeConfig.model_fields[f].default]
        if given and not self.train:
            raise ValueError(
                f"{', '.join(given)} is of a VAE that is trained with the flow, and vae.train is false; set it to "
                f"true, or leave {', '.join(given)} out"
            )
        return self


class TrainFlowConfig(StrictModel):
    """The flow on the VAE's latents: its sizes, path, and how it is trained."""

    model: DiTConfig = DiTConfig()
    flow: PathConfig = PathConfig()
    train: FlowTrainConfig = FlowTrainConfig()
    vae: JointVaeConfig = JointVaeConfig()

    @model_validator(mode="after")
    def _samples_are_of_a_flow_alone(self) -> TrainFlowConfig:
        if self.train.sample_every is not None and self.vae.train:
            raise ValueError(
                f"train.sample_every ({self.train.sample_every}) generates with the VAE of train_vae, and vae.train "
                "trains it on; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _a_cap_on_genes_needs_genes(self) -> TrainFlowConfig:
        if self.train.feed.max_genes is not None and not self.vae.train:
            raise ValueError(
                f"train.feed.max_genes ({self.train.feed.max_genes}) caps the genes of a cell, and the flow is trained "
                "on cached latents, which have none; leave it out, or set vae.train=true"
            )
        return self


class GenerateConfig(StrictModel):
    """Which cells are made, and how."""

    conditions: ConditionsTable | None = None
    """CSV, TSV or Parquet table: label columns, n_cells and, if you like, guidance (or guidance.<label>), library_size.
    An empty field of a label: generated without that label; of another column: as the settings below say."""
    cells: list[dict[str, Any]] | None = None
    """The same table inline: [{cell_type: B, n_cells: 1000}, …]."""
    per_label: dict[str, PositiveInt] | None = None
    """So many cells for each class of a label: {cell_type: 200}."""
    like: Literal["train", "validation", "test"] | None = None
    """As many cells of each combination of labels as this split has."""
    n_cells: PositiveInt | None = None
    """With `like`: how many cells in all, at the same composition. Alone: so many unconditional cells."""
    library_size: Literal["statistics"] | PositiveFloat = "statistics"
    """Sum of counts that the decoder is asked for: drawn from the training cells' statistics of the condition (its
    combination of labels, else the label with most cells, else all cells), or one number for all cells."""
    genes: list[str] | GeneFile | None = None
    """Genes that are written: ids or names, or a text file with one on each line. All are decoded either way, so that
    the counts of a gene do not depend on which others are written."""
    sampler: SamplerConfig = SamplerConfig()
    shard_size: int = Field(25_000, ge=1, le=250_000)
    """Cells of a file."""
    batch_size: PositiveInt | None = None
    """Cells that an actor has decoded ahead of its writer, in whole tiles (32 cells on a CPU, up to 1,024 on a GPU).
    Null: two tiles. It decides memory, never a count."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Of noise, library sizes and counts: another seed, other cells."""


CFGEN: dict[str, Any] = {
    "n_pcs": 30,
    "n_top_genes": 2000,
    "gene_rule": "seurat_v3",
    "space_from": "held_out",
    "class_average": "classes",
}
PROTOCOLS: dict[str, dict[str, Any]] = {"default": {}, "cfgen": CFGEN, "paper": CFGEN}


class EvaluateConfig(StrictModel):
    """Generated cells beside held-out real ones."""

    protocol: Literal["default", "cfgen", "paper"] = "default"
    """Named settings. cfgen: as CFGen was evaluated (2,000 genes by seurat_v3, log1p CP10k, 30 components fitted on the
    real cells that are compared with, classes averaged alike). paper: the scLDM paper's, which is not published: the
    nearest published one, cfgen's. A setting that a protocol owns can be set to its value only."""
    split: Literal["validation", "test"] = "test"
    """Held-out cells that are compared with."""
    n_pcs: PositiveInt = 30
    """Principal components of the space."""
    n_top_genes: PositiveInt = 2000
    """Genes of the space."""
    gene_rule: Literal["variance", "seurat_v3"] = "variance"
    """Which genes the PCA sees: of highest variance of log1p CP10k, or of highest standardised variance of counts."""
    space_from: Literal["training", "held_out"] = "training"
    """Real cells that genes and PCA are fitted on."""
    class_average: Literal["cells", "classes"] = "cells"
    """Means over classes: weighted by their real cells, or every class alike."""
    max_cells: PositiveInt = 5000
    """Real and generated cells scored at most; drawn by seed. Statistics of genes and of cells are also taken over all
    generated cells."""
    n_neighbors: PositiveInt = 15
    """Of the label classifier."""
    transport_cells: PositiveInt = 1000
    """Cells a side in the exact Wasserstein distances; time grows as its cube."""
    min_class_cells: int = Field(20, ge=8)
    """Real and generated cells that a class must have to be scored on its own; the others are listed."""
    control: dict[str, str] | None = None
    """Class that the others are compared with in log fold changes, {cytokine: PBS}: its real training cells, of the
    same other labels where labels are crossed. Null: all other cells."""
    reconstruction_cells: PositiveInt = 512
    """Held-out cells that the VAE encodes and decodes."""
    resamples: int = Field(100, ge=5)
    """Random halves of the cells behind the 95 % intervals of scores that are sums over cells or pairs."""
    refits: int = Field(10, ge=5)
    """The same for scores that are solved anew for each: Wasserstein, neighbours, classifier, classes, reconstruction.
    Time grows with it."""
    umap: bool = True
    """False draws the first two principal components instead, which is quicker."""
    seed: int = Field(0, ge=0)
    """Of the cells that are drawn, of the classifiers and the pictures."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_protocol_says(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("protocol") not in PROTOCOLS:
            return given  # said by the type
        name = given["protocol"]
        owned = PROTOCOLS[name]
        wrong = [f"{k} is {v} in it, got {given[k]}" for k, v in owned.items() if k in given and given[k] != v]
        if wrong:
            raise ValueError(
                f"protocol ({name}) owns these settings: {'; '.join(wrong)}; leave them out, or take protocol=default"
            )
        return {**given, **owned}

    @model_validator(mode="after")
    def _refits_are_among_the_resamples(self) -> EvaluateConfig:
        if self.refits > self.resamples:
            raise ValueError(f"refits ({self.refits}) must not exceed resamples ({self.resamples})")
        return self
