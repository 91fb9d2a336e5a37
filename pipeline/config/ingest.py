"""Settings of ingest: the source of the cells, which cells and genes, and the split."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.config.input_paths import (
    BarcodeTable,
    GeneVocabulary,
    H5adPath,
    HeldOutTable,
    OldCells,
    OldModels,
    SomaUri,
    TenxPath,
    VectorTable,
)
from pipeline.config.paths.expand import PathText
from pipeline.config.s3 import S3Config
from scldm.config import StrictModel
from scldm.data.labels.reserved_names import is_reserved

MISSING_TEXT = ("nan", "NaN", "<NA>")


# ---- sources -----------------------------------------------------------------------------------------------------
class SyntheticSource(StrictModel):
    """Synthetic cells: gene programmes, cell types, negative-binomial counts; a function of the seed."""

    type: Literal["synthetic"]
    n_cells: PositiveInt = 4000
    """Number of cells."""
    n_genes: PositiveInt = 1000
    """Number of genes."""
    n_types: PositiveInt = 6
    """Classes of cell_type."""
    n_donors: PositiveInt = 4
    """Classes of donor_id."""
    n_treatments: PositiveInt | None = None
    """Classes of the column treatment besides "control". Their effects are known: cell types share a part of each, and
    have a part of their own; evaluate shows them beside measured and generated cells. Null: no such column."""
    within_types: Literal["trajectories"] | None = None
    """How cells of a type differ. trajectories: they lie on a curve in expression, run gene programmes, come in two
    batches (dataset_id), and the last type is rare, 2 % of the cells; evaluate then says how near generated cells and
    the VAE are to the process that the cells were drawn from. Null: they scatter about the mean of their type."""
    seed: int = Field(0, ge=0)
    """Seed of the synthetic cells; independent of the job's seed."""

    @model_serializer(mode="wrap")
    def _without_unset(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before these settings existed."""
        return {k: v for k, v in to_dict(self).items() if k not in ("n_treatments", "within_types") or v is not None}

    @model_validator(mode="after")
    def _treatments_are_of_scattered_cells(self) -> SyntheticSource:
        if self.within_types is not None and self.n_treatments is not None:
            raise ValueError(
                f"n_treatments ({self.n_treatments}) and within_types ({self.within_types}) exclude each other: cells "
                "on trajectories have no treatments; leave one of the two out"
            )
        return self


class H5adSource(StrictModel):
    """One or many `.h5ad` files with raw counts; written once into a SOMA experiment."""

    type: Literal["h5ad"]
    path: H5adPath
    """File, folder of files or glob pattern."""
    layer: str | None = None
    """Location of the counts: the name of a layer, "raw" for adata.raw, or null for X. "layers/raw" is a layer that is
    called raw."""
    columns: dict[str, str] = {}
    """Renamed obs columns, new name -> name in the file: {cell_type: louvain, donor_id: patient}."""
    gene_id: str | None = None
    """var column that holds the gene id (Ensembl); null takes the var index."""
    gene_name: str | None = None
    """var column that holds the gene symbol; null takes the var index."""


class TenxSource(StrictModel):
    """One or many Cell Ranger outputs, version 2 or 3; written once into a SOMA experiment.

    Features other than "Gene Expression" are left out; a note says how many.
    """

    type: Literal["10x"]
    path: TenxPath
    """A folder with matrix.mtx, genes.tsv or features.tsv, and barcodes.tsv (gzipped or not), an .h5 file, a folder of
    such folders and files, or a glob pattern: every match is a sample, whose name becomes dataset_id."""
    genome: str | None = None
    """Genome to read if an output holds several."""
    obs: BarcodeTable | None = None
    """Table of cell metadata, .csv, .tsv or .parquet, with the columns `barcode` (or barcodes in a first column or an
    index without a name), `sample` if there are several samples, and the labels. Cells that are not in the table have
    no labels."""
    columns: dict[str, str] = {}
    """Renamed columns of that table, new name -> name in the table."""


class SomaSource(StrictModel):
    """An existing SOMA experiment, read in place."""

    type: Literal["soma"]
    uri: SomaUri
    """Folder, or s3://bucket/experiment."""
    region: str | None = None
    """AWS region of an s3:// URI."""
    anonymous: bool = False
    """Read s3:// without credentials, for public buckets. False finds credentials as AWS's own tools do: AWS_*
    variables, ~/.aws, the machine's role. Job files never hold keys."""
    s3: S3Config = S3Config()
    """S3 requests."""
    measurement: str = "RNA"
    """Measurement of the experiment: ms[measurement]."""
    layer: str = "raw"
    """Layer of raw counts: ms[measurement].X[layer]."""


class CensusSource(StrictModel):
    """The CELLxGENE Census, opened by version from its public bucket; no account needed."""

    type: Literal["census"]
    version: str
    """A dated release such as 2025-01-30. "stable" and "latest" are resolved once; the release is recorded in the facts
    of the stage (census_version), and every later stage reads that one."""
    organism: Literal["homo_sapiens", "mus_musculus"] = "homo_sapiens"
    """Each organism is an experiment of its own in the Census."""
    s3: S3Config = S3Config()
    """S3 requests."""


Source = Annotated[SyntheticSource | H5adSource | TenxSource | SomaSource | CensusSource, Field(discriminator="type")]


# ---- stages ------------------------------------------------------------------------------------------------------
Value = str | bool | int | float


def _class_name(value: Any) -> Any:
    """Return the class that a number or boolean in YAML names: 1 and 1.0 are "1"."""
    from scldm.data.class_names import class_text  # imports pandas, which reading a job does not need

    return class_text(value) if isinstance(value, (bool, int, float)) else value


ClassName = Annotated[str, BeforeValidator(_class_name)]


class CellsConfig(StrictModel):
    """Which cells of the source; a cell must meet all conditions and obs_filter."""

    is_primary_data: bool | None = None
    """true selects every cell of the Census once: many occur twice, in collections that reuse other data sets."""
    tissue: str | list[str] | None = None
    """Values of the column tissue_general, for example [lung, blood]; for finer tissues: where: {tissue: …}."""
    assay: str | list[str] | None = None
    """Values of the column assay, for example ["10x 3' v2", "10x 3' v3"]."""
    organism: str | list[str] | None = None
    """Values of the column organism. An experiment of the Census has one organism, chosen by ingest.source.organism."""
    where: dict[str, Value | list[Value]] = {}
    """Values of any other obs column, one or a list: {disease: normal, donor_id: [D1, D2]}."""

    def conditions(self) -> dict[str, list[Value]]:
        """Return the accepted values of each obs column that has a condition."""
        named = {
            "is_primary_data": self.is_primary_data,
            "tissue_general": self.tissue,
            "assay": self.assay,
            "organism": self.organism,
        }
        found = {k: v for k, v in named.items() if v is not None} | self.where
        return {k: list(v) if isinstance(v, list) else [v] for k, v in found.items()}

    @model_validator(mode="after")
    def _says_something_once(self) -> CellsConfig:
        names = {"is_primary_data": self.is_primary_data, "tissue_general": self.tissue}
        names |= {"assay": self.assay, "organism": self.organism}
        if twice := [k for k in self.where if names.get(k) is not None]:
            raise ValueError(f"where names {', '.join(twice)}, which has a field of its own here; say it once")
        if empty := [k for k, v in self.conditions().items() if not v]:
            raise ValueError(f"{', '.join(empty)} lists no value, which no cell has; leave it out to take all cells")
        return self


class GenesConfig(StrictModel):
    """Which genes the model knows."""

    vocabulary: GeneVocabulary = "source"
    """source: the genes of the source. Otherwise a file that lists genes in order (.json, .txt, .csv, .tsv, .parquet,
    .h5ad; a text file may have a header such as gene_id), or the folder of a model, to align the cells to that
    vocabulary."""
    match: Literal["id", "symbol"] = "id"
    """How genes of a vocabulary are found in the source: by id (the version in ENSG….12 is ignored), or by
    feature_name. A symbol that several genes of the source share matches none of them; a note says so."""
    max_missing: float = Field(0.2, ge=0, le=1)
    """Largest fraction of a vocabulary's genes that the source may lack."""
    presence: bool = False
    """Whether genes that a cell's data set did not measure are left out of that cell's likelihood and are never shown
    to the encoder as zeros. Measured genes are those of the file for h5ad and 10x, and the
    feature_dataset_presence_matrix for SOMA and the Census. False treats every absent count as a zero; a note says if
    that is uncertain."""
    value_filter: str | None = None
    """SOMA value filter on var, for example "feature_length > 500"."""
    min_cells: int = Field(0, ge=0)
    """Keep genes that at least this many training cells express. 0 keeps every gene of the source."""

    @model_validator(mode="after")
    def _keeps_a_given_vocabulary_whole(self) -> GenesConfig:
        if self.vocabulary == "source":
            if self.match != "id":
                raise ValueError("match (symbol) aligns the source to a vocabulary; name one in vocabulary")
            return self
        for field, value in (("min_cells", self.min_cells), ("value_filter", self.value_filter)):
            if value:
                raise ValueError(
                    f"{field} ({value}) leaves out genes, but vocabulary ({self.vocabulary}) says which there are; "
                    f"drop {field}, or set vocabulary: source"
                )
        return self


class HeldOutConfig(StrictModel):
    """Combinations of labels whose cells are all held out."""

    split: Literal["validation", "test"] = "test"
    """The split that the combinations go to."""
    combinations: list[dict[str, Value | list[Value]]] | None = None
    """Combinations, each with a class or a list of classes for some obs columns: [{cell_type: CD4 Naive, cytokine:
    [IL-2, IFN-beta]}] holds out two combinations."""
    table: HeldOutTable | None = None
    """The same as a CSV or Parquet table: obs columns, one combination per row, an empty field for any class. An
    optional column `split` sets validation or test for each row."""

    @model_validator(mode="after")
    def _said_once(self) -> HeldOutConfig:
        if (self.combinations is None) == (self.table is None):
            raise ValueError("give either combinations or table")
        if self.combinations is not None and not all(self.combinations or [{}]):
            raise ValueError("combinations must not be empty: a combination without a class is every cell's")
        return self


class SplitConfig(StrictModel):
    """The fractions of held-out cells. The split is a hash of `by`: the same cell is always in the same split."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Fraction of the cells in the validation split."""
    test: float = Field(0.1, ge=0, lt=1)
    """Fraction of the cells in the test split, which evaluate compares with."""
    by: Literal["cell", "tile", "donor_id", "dataset_id"] = "cell"
    """What is hashed. donor_id and dataset_id keep donors and data sets together. cell spreads the held-out cells over
    the store, so that reading them costs nearly as much as reading all cells; tile holds out whole storage tiles of
    2,048 rows, which are read at full speed (an alternative is cell with ingest.cache)."""
    salt: str = "scldm"
    """Another salt gives another split."""
    held_out: HeldOutConfig | None = None
    """Combinations of labels that no training cell has. The other cells are split by hash; the fraction of the split
    that the combinations go to is then 0 unless set, so that they are not mixed with other cells."""

    @model_validator(mode="before")
    @classmethod
    def _combinations_alone(cls, given: Any) -> Any:
        if isinstance(given, dict) and (held_out := given.get("held_out")) is not None:
            side = held_out.get("split", "test") if isinstance(held_out, dict) else getattr(held_out, "split", "test")
            if side in ("validation", "test"):
                return {side: 0.0, **given}
        return given

    @model_validator(mode="after")
    def _leaves_training_cells(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation ({self.validation}) + test ({self.test}) must leave cells to train on")
        return self


class ReplayConfig(StrictModel):
    """Old cells among the training cells, so that a model that is trained on does not forget them.

    They are in no other split, and neither statistics nor `like: train` count them. Their classes are added to those of
    the labels; a label that they lack is the null class.
    """

    pipeline: OldCells | None = None
    """The pipeline that the model was trained in (runs/census), or its ingest: old cells are its training cells."""
    source: Source | None = None
    """Or: a source of old cells, as ingest.source. All of its cells may be taken, also those that another pipeline
    holds out."""
    model: OldModels | None = None
    """Or: the old model, a VAE and a flow under one name (runs/census, models/census), which generates the old cells at
    the composition of its training cells. It must have a count head."""
    share: float = Field(0.2, gt=0, lt=1)
    """Fraction of old cells among the training cells, and so of an epoch; in a step it varies as the share of a
    class does."""
    cells: CellsConfig = CellsConfig()
    """Which cells of `source`, as ingest.cells."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the choice of old cells, or of the generated cells."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> ReplayConfig:
        given = [name for name in ("pipeline", "source", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "old cells come from one of pipeline (its training cells), source, or model (which generates them); "
                f"got {' and '.join(given) or 'none'}"
            )
        if self.cells.conditions() and self.source is None:
            raise ValueError("cells chooses cells of source, and old cells come from another place; leave it out")
        return self


class NumberLabel(StrictModel):
    """A label that is a number: a dose, a time, an age.

    The network is given its value, so that others than those of the data can be generated, between them or beyond.
    """

    type: Literal["number"]
    unit: str = ""
    """Its unit, for notes, plan and model card: uM, h."""
    scale: Literal["linear", "log"] = "linear"
    """log: equal ratios are equal steps, as of doses; every value is then above 0."""
    zero: list[ClassName] = []
    """Values of the untreated control, which are no point on the scale: [0] of a dose on a log scale."""


class SetLabel(StrictModel):
    """A label that is a set, as several perturbations at once: A+B is B+A, and the embeddings of its members add up.

    Any set of members that the data have can be generated.
    """

    type: Literal["set"]
    separator: str = Field("+", min_length=1)
    """Text between two members."""
    zero: list[ClassName] = []
    """Names of no perturbation: alone the untreated control, beside others nothing (A+ctrl is A)."""


class VectorLabel(StrictModel):
    """A label of names that have a vector each in a table of yours.

    The network is given the vector, so that every name of the table can be generated, measured or not.
    """

    type: Literal["vector"]
    embeddings: VectorTable
    """A CSV, TSV or Parquet table: names in the column `name` or the first one, all other columns numbers (or one
    column of lists). From anywhere: ESM, GenePT, Morgan fingerprints."""
    zero: list[ClassName] = []
    """Names of the untreated control, which need no vector: [non-targeting]."""


LabelValue = Annotated[NumberLabel | SetLabel | VectorLabel, Field(discriminator="type")]


class IngestConfig(StrictModel):
    """Vocabularies, split and statistics of a source; the counts stay in SOMA."""

    source: Source
    """The source of cells; `type` says which kind."""
    labels: list[str] = ["cell_type"]
    """obs columns that the flow is conditioned on."""
    label_values: dict[str, LabelValue] = {}
    """Labels whose classes are values, so that a value that no cell had can be generated: numbers ({dose: {type:
    number, unit: uM, scale: log}}), sets ({drugs: {type: set}}), or names with a vector each ({gene: {type: vector,
    embeddings: genes.parquet, zero: [non-targeting]}}). The others are classes."""
    cells: CellsConfig = CellsConfig()
    obs_filter: str | None = None
    """SOMA value filter on obs, for what `cells` cannot say: "n_genes > 500 or tissue_general == 'lung'". A column
    whose name holds a space is written attr('n genes')."""
    max_cells: PositiveInt | None = None
    """Maximum number of cells after filtering. They are taken from few storage tiles, but from at least 16, so that a
    part of a large store is fast to read and still mixed. Deterministic; null takes all cells. Files are always written
    to SOMA as a whole."""
    missing_label: Literal["error", "drop"] = "error"
    """What to do with cells that have no value for a label."""
    missing_text: tuple[str, ...] = MISSING_TEXT
    """Texts that are no class but a missing value, beside the empty text: what nulls become when a column is saved as
    text. [] keeps them as classes; add "None" or "NA" if these are no classes in your data."""
    genes: GenesConfig = GenesConfig()
    split: SplitConfig = SplitConfig()
    replay: ReplayConfig | None = None
    """Old cells that are trained on beside those of the source, for train_vae.start_from and train_flow.start_from."""
    cache: bool | PathText | None = None
    """A cache that all cells are written to once, as sparse shards, and that every epoch of every job reads, in the
    same order and with the same batches: true for <output>/cache, or a folder that every node sees. Worthwhile from the
    second epoch on. null (or false) streams from SOMA. Jobs with the same cells and genes share a cache; turning it on
    or off makes another version of ingest."""

    @field_validator("labels")
    @classmethod
    def _names_of_their_own(cls, labels: list[str], info: ValidationInfo) -> list[str]:
        if taken := [x for x in labels if is_reserved(x)]:
            renamed = isinstance(info.data.get("source"), (H5adSource, TenxSource))
            raise ValueError(
                f"{', '.join(taken)}: requests or generated cells have columns of this name, which would hide it; "
                + (
                    f"read it under another name, for example my_{taken[0]} (ingest.source.columns: {{my_{taken[0]}: "
                    f"{taken[0]}}})"
                    if renamed
                    else "take another column: those of this source are not renamed"
                )
            )
        if twice := sorted({x for x in labels if labels.count(x) > 1}):
            raise ValueError(f"{', '.join(twice)}: named twice; name each label once")
        return labels

    @field_validator("label_values")
    @classmethod
    def _of_labels(cls, given: dict[str, LabelValue], info: ValidationInfo) -> dict[str, LabelValue]:
        labels = info.data.get("labels", [])
        if unknown := [x for x in given if x not in labels]:
            raise ValueError(f"{', '.join(unknown)}: no label of this job ({', '.join(labels)}); name it in labels too")
        for label, values in given.items():
            if isinstance(values, SetLabel) and (joined := [z for z in values.zero if values.separator in z]):
                raise ValueError(
                    f"{label}.zero: {', '.join(joined)} holds the separator {values.separator!r}; name members"
                )
        return given

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out settings that 0.1.0 did not have and that are not set: the versions of its folders stay theirs."""
        settings = plain(self)
        if self.missing_text == MISSING_TEXT:
            settings.pop("missing_text", None)
        if self.replay is None:
            settings.pop("replay", None)
        if not self.label_values:
            settings.pop("label_values", None)
        return settings
