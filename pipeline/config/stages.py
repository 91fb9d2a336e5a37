"""Settings of the stages after ingest: a section of a pipeline's job file, or the top level of a stage's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pipeline.config.apply import ModelNames
from pipeline.config.ingest import ClassName
from pipeline.config.input_paths import (
    ConditionsTable,
    GeneFile,
    GeneTable,
    LibrarySizePlace,
    PretrainedVae,
    StartFlow,
    StartVae,
    TeacherFlow,
    VectorFile,
)
from pipeline.config.train import DistilTrainConfig, FlowStartConfig, FlowTrainConfig, VaeTrainConfig
from scldm.config import StrictModel
from scldm.flow.config import ControlStart, PathConfig, SamplerConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.kernels.precision import Precision
from scldm.optim.config import LoraConfig, OptimizerConfig


class StartConfig(StrictModel):
    """Weights to start from, and which of them are trained."""

    model: str
    freeze: list[str] = []
    """Parts that are not trained, by the beginning of their parameters' names: encoder or gene_embedding of a VAE,
    blocks or input of a flow."""
    lora: LoraConfig | None = None
    """Train low-rank adapters, and what is new, in place of all weights; they are merged at the end."""
    old_learning_rate: float | None = Field(None, gt=0, lt=1)
    """Learning rate of all that is taken over, relative to that of what is new: new genes, new classes, another head,
    adapters. Rows of one table may differ. Null: the same for all."""

    @model_validator(mode="after")
    def _keeps_parts_in_one_way(self) -> Self:
        if self.lora is not None and self.freeze:
            raise ValueError("lora keeps all weights that are taken over, and freeze says nothing more; leave one out")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before these settings existed."""
        return _without_unset(to_dict(self), ("old_learning_rate", "gene_embeddings"))


class StartVaeConfig(StartConfig):
    """The VAE to start from; a name alone stands for {model: NAME}.

    Genes are matched by id; new ones start at the mean of the others.
    """

    model: StartVae
    """Name of the model, from anywhere: runs/census, models:/census-vae@champion, a folder."""
    gene_embeddings: GeneTable | None = None
    """A table with a vector for each gene, from another model (ESM, GenePT): ids or symbols in the column feature_id or
    the first one, all other columns numbers. New genes start where a regression on their vectors predicts; null, and
    genes without a vector: at the mean."""


class StartFlowConfig(StartConfig):
    """The flow to start from; a name alone stands for {model: NAME}.

    Classes are matched by name; a new one starts at the null class, or at its parent.
    """

    model: StartFlow
    """Name of the model, from anywhere: runs/census, models:/census-flow@champion, a folder."""
    parents: dict[str, dict[ClassName, ClassName]] = {}
    """Label -> new class -> class of the model whose embedding it starts at: {cell_type: {CD4 naive: CD4 T}}."""


class TrainVaeConfig(StrictModel):
    """The VAE: its sizes and its training."""

    model: VAEConfig = VAEConfig()
    train: VaeTrainConfig = VaeTrainConfig()
    pretrained: PretrainedVae | None = None
    """A trained VAE that is used as it is, by name (runs/census, models:/census-vae@champion, hf://…, a folder).
    `model: NAME, train: false` says the same. ingest.genes.vocabulary is then the model's, unless it is set."""
    start_from: StartVaeConfig | None = None
    """A trained VAE whose weights training starts from. Sizes that `model` does not set are its own."""

    @model_validator(mode="after")
    def _decoder_needs_no_condition(self) -> TrainVaeConfig:
        if self.model.adaln:
            raise ValueError(
                "model.adaln (true) needs a condition vector per cell, which train_vae does not have; set it to false"
            )
        if self.pretrained is not None and self.start_from is not None:
            raise ValueError("pretrained uses a model as it is and start_from trains it on; leave one of them out")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before these settings existed."""
        return _without_unset(to_dict(self), ("pretrained", "start_from"))


def _without_unset(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in names or v is not None}


class EncodeConfig(StrictModel):
    """The latent cache that the flow is trained on."""

    batch_size: PositiveInt = 256
    """Cells that an actor encodes in one batch."""
    splits: list[Literal["train", "validation", "test"]] = ["train", "validation"]
    """Splits that are encoded."""
    precision: Precision | None = None
    """Precision of the network's products: fp32, tf32 or bf16; `latents` says how they are stored. Null: by device,
    fp32 on a CPU, bf16 on a GPU that has it (else tf32, else fp32). The manifest says which; a job that goes on keeps
    the one that it began with."""
    latents: Literal["float32", "float16"] = "float32"
    """Type of the numbers on disk; training reads them as float32. float16 halves the cache and rounds each number by
    at most 0.05 %: latents are normalised, so that none is too large for it."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before this setting existed."""
        values = _without_unset(to_dict(self), ("precision",))
        return {k: v for k, v in values.items() if (k, v) != ("latents", "float32")}


class JointVaeConfig(StrictModel):
    """Fine-tuning of the VAE together with the flow."""

    train: bool = False
    """true trains the VAE too: counts are streamed instead of the latent cache, the stage does not need encode, and it
    exports both networks. generate and evaluate then use this VAE."""
    weight: PositiveFloat = 1.0
    """Weight of the VAE's negative log-likelihood (nats per cell) relative to the flow's loss (mean square of a
    latent)."""
    genes_per_step: PositiveInt | None = None
    """Genes scored in a training step, as train_vae.train.genes_per_step."""

    @model_validator(mode="after")
    def _is_of_a_joint_training(self) -> JointVaeConfig:
        given = [f for f in ("weight", "genes_per_step") if getattr(self, f) != JointVaeConfig.model_fields[f].default]
        if given and not self.train:
            raise ValueError(
                f"{', '.join(given)} only applies if vae.train is true; set vae.train to true, or remove "
                f"{', '.join(given)}"
            )
        return self


class TrainFlowConfig(StrictModel):
    """The flow on the VAE's latents: its sizes, path and training."""

    model: DiTConfig = DiTConfig()
    flow: PathConfig = PathConfig()
    start: FlowStartConfig | None = None
    """Start at the latents of control cells beside noise. Null: from noise only."""
    train: FlowTrainConfig = FlowTrainConfig()
    vae: JointVaeConfig = JointVaeConfig()
    start_from: StartFlowConfig | None = None
    """A trained flow whose weights training starts from; it must have been trained on latents of the same VAE. Sizes
    that `model` does not set, and a path that `flow` does not set, are its own."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before these settings existed."""
        return _without_unset(to_dict(self), ("start", "start_from"))

    @property
    def controls(self) -> ControlStart | None:
        """What the flow is trained from beside noise, as its model records it."""
        if self.start is None:
            return None
        [(label, control)] = self.start.control.items()
        return ControlStart(label=label, control=control, share=self.start.share)

    @model_validator(mode="after")
    def _starts_at_controls_if_it_can(self) -> TrainFlowConfig:
        if self.start is None:
            return self
        if self.vae.train:
            raise ValueError(
                "start takes the latents of control cells from the latent cache, and vae.train changes the latents in "
                "every step; leave one of them out"
            )
        if self.flow.prediction != "velocity" or self.flow.path == "vp":
            raise ValueError(
                f"start needs a velocity on the path linear or gvp, which begins at the control cell; flow is "
                f"{self.flow.prediction} on {self.flow.path}: set flow.prediction=velocity and flow.path=linear"
            )
        if self.start.share == 1 and self.train.sample_every is not None:
            raise ValueError(
                f"train.sample_every ({self.train.sample_every}) generates cells from noise, and with start.share (1) "
                "none are trained from it; lower start.share, or leave train.sample_every out"
            )
        return self

    @model_validator(mode="after")
    def _starts_alone(self) -> TrainFlowConfig:
        if self.start_from is not None and self.vae.train:
            raise ValueError(
                "start_from gives weights to a flow that is trained on latents, and vae.train trains the VAE with a "
                "new flow; leave one of them out"
            )
        return self

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


class DistilConfig(StrictModel):
    """A trained flow, made into one that generates a cell with one, two or four evaluations of its network."""

    model: TeacherFlow | None = None
    """Name of the flow to distil, from anywhere: runs/census, models:/census-flow@champion, a folder. Null: the flow
    that this pipeline trained."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of that flow are used."""
    evaluations: Literal[1, 2, 4] = 2
    """Evaluations of the network that make a cell. Fewer are faster, and miss the flow by more: val/loss, and the table
    in benchmarks/README.md."""
    guidance: dict[str, float] | float = 1.0
    """Guidance that is trained in, as generate.sampler.guidance: a distilled flow costs one output an evaluation with
    any, and takes no other."""
    trajectories: PositiveInt = 20_000
    """Trajectories from noise to latents that are solved, once, and trained on. They need no cells: their labels are
    drawn from the combinations that the flow was trained on, with probabilities as the square root of their numbers of
    cells, and some are dropped as in the flow's training."""
    teacher_steps: PositiveInt = 16
    """Steps of the solver (adams) that follows a trajectory; a multiple of `evaluations`."""
    shard_size: PositiveInt = 2048
    """Trajectories in a file: what is solved again, at most, if the job is interrupted."""
    train: DistilTrainConfig = DistilTrainConfig()

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_unset(to_dict(self), ("model",))

    @model_validator(mode="after")
    def _solver_stops_where_jumps_end(self) -> DistilConfig:
        if self.teacher_steps % self.evaluations:
            raise ValueError(
                f"teacher_steps ({self.teacher_steps}) must be a multiple of evaluations ({self.evaluations}), so that "
                "the solver stops where a jump ends"
            )
        return self


class LibrarySizesOf(StrictModel):
    """Statistics of library sizes of other cells than those that the model was trained on."""

    of: LibrarySizePlace
    """A pipeline or its ingest (runs/mine: its training cells), a model, or an .h5ad file whose X holds counts: all of
    its cells, over the genes of the model; obs columns that are called as its labels give conditions."""


class GenerateConfig(StrictModel):
    """Which cells are generated, and how."""

    model: ModelNames | None = None
    """Models by name, from anywhere: models/dentate, models:/census@champion, or {vae: …, flow: …}. Labels, genes and
    library sizes are those of the model, and no stage of this pipeline is read, but ingest with `like`. Null: the
    models that this pipeline trained."""
    flow: Literal["train_flow", "distil"] | None = None
    """Which flow of this pipeline is used: the trained one, or the distilled one. Null: the distilled one in a pipeline
    with a section `distil`, else the trained one."""
    conditions: ConditionsTable | None = None
    """CSV, TSV or Parquet table with label columns, n_cells and, optionally, guidance (or guidance.<label>) and
    library_size. An empty label field means: generated without that label; in another column: as set below."""
    cells: list[dict[str, Any]] | None = None
    """The same table inline: [{cell_type: B, n_cells: 1000}, …]."""
    per_label: dict[str, PositiveInt] | None = None
    """The same number of cells for each class of a label: {cell_type: 200}."""
    like: Literal["train", "validation", "test"] | None = None
    """Cells with the label composition of this split: as many of each combination as it has."""
    n_cells: PositiveInt | None = None
    """With `like`: the total number of cells, at the same composition. Alone: the number of unconditional cells."""
    library_size: Literal["statistics"] | PositiveFloat | LibrarySizesOf = "statistics"
    """Sum of counts of a generated cell: drawn from the statistics of the training cells with the same condition (its
    combination of labels, else the label with most cells, else all cells), or of other cells ({of: runs/mine}), or one
    number for all cells."""
    genes: list[str] | GeneFile | None = None
    """Genes to write: ids or names, or a text file with one on each line. All genes are decoded either way, so the
    counts of a gene do not depend on which others are written."""
    sampler: SamplerConfig = SamplerConfig()
    start: Literal["noise", "control"] = "noise"
    """control: control cells with the same other labels are made from noise and carried to the labels of the row, by a
    flow that was trained from control cells too (train_flow.start); guidance is that of the second way. Control cells
    themselves, and rows without that label, are made from noise."""
    decoder_condition: VectorFile | None = None
    """A .npy file with the condition vectors of an adaLN decoder: (d,) for all cells, or one for each row of the
    request, (rows, d). Upstream defines no source of them; other decoders take none."""
    shard_size: int = Field(25_000, ge=1, le=250_000)
    """Cells per file."""
    batch_size: PositiveInt | None = None
    """Cells that an actor decodes ahead of its writer, in whole tiles (32 cells on a CPU, up to 1,024 on a GPU). Null:
    two tiles. Affects memory, never results."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of noise, library sizes and counts: another seed gives other cells."""
    precision: Precision | None = None
    """Precision of the networks' products: fp32, tf32 or bf16. Softmax over genes, likelihood, dispersion and the
    solver's state are fp32 in each. Null: by device, fp32 on a CPU, bf16 on a GPU that has it (else tf32, else fp32),
    and fp32 for the solver dopri5. The output says which; a job that goes on keeps the one that it began with."""

    @model_validator(mode="after")
    def _has_the_models_that_it_uses(self) -> GenerateConfig:
        if self.model is not None and self.model.flow is None:
            raise ValueError("model has no flow, and cells are generated by one: give model.flow")
        if self.model is not None and self.flow is not None:
            raise ValueError(
                f"flow ({self.flow}) chooses between the flows of this pipeline, and model names another; leave one of "
                "them out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before this setting existed."""
        values = _without_unset(to_dict(self), ("model", "decoder_condition", "flow", "precision"))
        return {k: v for k, v in values.items() if (k, v) != ("start", "noise")}


CFGEN: dict[str, Any] = {
    "n_pcs": 30,
    "n_top_genes": 2000,
    "gene_rule": "seurat_v3",
    "space_from": "held_out",
    "class_average": "classes",
}
PROTOCOLS: dict[str, dict[str, Any]] = {"default": {}, "cfgen": CFGEN, "paper": CFGEN}


class EvaluateConfig(StrictModel):
    """Comparison of generated cells with held-out real ones."""

    protocol: Literal["default", "cfgen", "paper"] = "default"
    """Named settings. cfgen: as CFGen was evaluated (2,000 genes by seurat_v3, log1p CP10k, 30 components fitted on the
    compared real cells, classes weighted equally). paper: the scLDM paper's protocol is not published; this is the
    nearest published one, cfgen's. A setting that a protocol owns can only be set to the protocol's value."""
    cells: Literal["generate", "perturb"] = "generate"
    """Cells that are scored: those of generate, or real cells that perturb moved, under the labels that they were moved
    to."""
    split: Literal["validation", "test"] = "test"
    """Held-out cells that generated cells are compared with."""
    n_pcs: PositiveInt = 30
    """Principal components of the space that cells are compared in."""
    n_top_genes: PositiveInt = 2000
    """Genes of that space."""
    gene_rule: Literal["variance", "seurat_v3"] = "variance"
    """Genes of the PCA: those with the highest variance of log1p CP10k, or of the highest standardised variance of
    counts."""
    space_from: Literal["training", "held_out"] = "training"
    """Real cells that the genes and the PCA are fitted on."""
    class_average: Literal["cells", "classes"] = "cells"
    """Weights of means over classes: by their number of real cells, or equal."""
    max_cells: PositiveInt = 5000
    """Maximum number of real and of generated cells that are scored; drawn by seed. Statistics of genes and of cells
    are also taken over all generated cells."""
    n_neighbors: PositiveInt = 15
    """Neighbours of the label classifier."""
    transport_cells: PositiveInt = 1000
    """Cells on each side of the exact Wasserstein distances; time grows as the cube."""
    min_class_cells: int = Field(20, ge=8)
    """Real and generated cells that a class must have to be scored; smaller classes are only listed."""
    control: dict[str, ClassName] | None = None
    """Control class of log fold changes, {cytokine: PBS}: its real training cells, with the same other labels if labels
    are crossed. Null: all other cells."""
    reconstruction_cells: PositiveInt = 512
    """Held-out cells that the VAE encodes and decodes."""
    resamples: int = Field(100, ge=5)
    """Random halves of the cells for the 95 % intervals of scores that are sums over cells or pairs."""
    refits: int = Field(10, ge=5)
    """Random halves for scores that are computed again for each: Wasserstein, neighbours, classifier, classes,
    reconstruction. Time grows with it."""
    umap: bool = True
    """Whether pictures show a UMAP; false shows the first two principal components, which is faster."""
    seed: int = Field(0, ge=0)
    """Seed of the drawn cells, the classifiers and the pictures."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before this setting existed."""
        return {k: v for k, v in to_dict(self).items() if (k, v) != ("cells", "generate")}

    @model_validator(mode="before")
    @classmethod
    def _as_the_protocol_says(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("protocol") not in PROTOCOLS:
            return given  # the type reports it
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


class PredictErrorConfig(StrictModel):
    """How far to believe what is predicted for combinations that no training cell has.

    Measured combinations are left out in turn, short trainings of a flow predict them, and what is learned from their
    errors is applied to the combinations that were not measured.
    """

    control: dict[str, ClassName] = Field(min_length=1)
    """Control class of each label that is a treatment: {cytokine: PBS}. The other labels are the context."""
    combinations: list[dict[str, ClassName]] | None = None
    """Combinations to predict the error for, each with a class for every label: [{cell_type: B cell, cytokine: IL-2}].
    Null, without `conditions`: all that no training cell has, whose context has control cells and whose treatment
    another context has."""
    conditions: ConditionsTable | None = None
    """The same as a table, CSV, TSV or Parquet, such as that of generate.conditions: a column for each label."""
    method: Literal["pooled", "flow", "shift"] | None = None
    """Cells whose error is predicted, and which the verdict is about: those of perturb with the same method (pooled:
    the cells to ask for where nothing was measured; shift: the free answer), or what a flow alone makes, as `start`
    says. The verdict compares pooled and flow with shift, and shift with pooled. Null: pooled; flow if `start` is
    given."""
    start: Literal["noise", "latents"] | None = None
    """Of method: flow. noise: cells of generate, as without this setting. latents: those of perturb with method: flow,
    from measured controls."""
    folds: int = Field(5, ge=2)
    """Groups in which measured combinations are left out. No treatment loses all its contexts. A training for each
    group and seed."""
    seeds: PositiveInt = 2
    """Trainings of each group with seeds of their own; their disagreement tells how far to believe."""
    base_steps: PositiveInt = 600
    """Steps on the control cells, once for each seed."""
    steps: PositiveInt = 400
    """Steps on all cells but those left out, from there."""
    batch_size: PositiveInt = 128
    """Cells of a step."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3)
    model: DiTConfig = DiTConfig(d_model=96)
    """Sizes of the flow."""
    sampler_steps: PositiveInt = 10
    """Steps of the sampler, as generate.sampler.steps."""
    cells: int = Field(200, ge=20)
    """Cells that are predicted for a combination, from as many of its context's control cells, at most."""
    max_cells: PositiveInt = 20_000
    """Training cells that are read, drawn by seed."""
    precision: Precision | None = None
    """Precision of the networks' products in predictions, as generate.precision; trainings are fp32."""

    @model_validator(mode="after")
    def _names_combinations_once(self) -> PredictErrorConfig:
        if self.combinations is not None and self.conditions is not None:
            raise ValueError("combinations and conditions both name combinations; give one of them")
        return self

    @model_validator(mode="after")
    def _starts_a_flow(self) -> PredictErrorConfig:
        if self.start is not None and self.judged != "flow":
            raise ValueError(
                f"start ({self.start}) is of method: flow, and method: {self.method} moves measured control cells; "
                "leave start out, or set method=flow"
            )
        return self

    @model_validator(mode="after")
    def _trains_with_labels_dropped(self) -> PredictErrorConfig:
        if not self.model.label_dropout:
            raise ValueError(
                "model.label_dropout (0) leaves no field without labels, which guidance needs; set it above 0"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before_there_were_methods(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before `method` existed: they judged a flow."""
        values = _without_unset(to_dict(self), ("precision",))
        values = {k: v for k, v in values.items() if k not in ("method", "start")}
        if self.judged == "flow":
            return values | {"start": self.start or "noise"}
        return values | ({"method": self.judged} if self.judged != "pooled" else {})

    @property
    def judged(self) -> Literal["pooled", "flow", "shift"]:
        """The method whose cells are judged."""
        return self.method or ("pooled" if self.start is None else "flow")
