"""What a job file may say of cells: where they come from, which of them and which genes, and how they are split."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipeline.config.input_paths import BarcodeTable, GeneVocabulary, H5adPath, HeldOutTable
from pipeline.config.s3 import S3Config
from scldm.config import StrictModel


# ---- sources -----------------------------------------------------------------------------------------------------
class SyntheticSource(StrictModel):
    """Cells made on the spot: gene programmes, cell types, negative-binomial counts; a function of the seed."""

    type: Literal["synthetic"]
    n_cells: PositiveInt = 4000
    """Cells that are made."""
    n_genes: PositiveInt = 1000
    """Genes of the vocabulary."""
    n_types: PositiveInt = 6
    """Classes of cell_type."""
    n_donors: PositiveInt = 4
    """Classes of donor_id."""
    seed: int = Field(0, ge=0)
    """Of the cells; not the job's."""


class H5adSource(StrictModel):
    """One or many `.h5ad` files with raw counts; written once into a SOMA experiment."""

    type: Literal["h5ad"]
    path: H5adPath
    """File, folder of files or glob pattern."""
    layer: str | None = None
    """Where the counts are: a layer's name, "raw" for adata.raw, or null for X."""
    columns: dict[str, str] = {}
    """Names to give to obs columns, Census name -> name in the file: {cell_type: louvain, donor_id: patient}."""
    gene_id: str | None = None
    """var column that holds the gene id (Ensembl); null takes the var index."""
    gene_name: str | None = None
    """var column that holds the gene symbol; null takes the var index."""


class TenxSource(StrictModel):
    """One or many Cell Ranger outputs, version 2 or 3; written once into a SOMA experiment.

    Of other features than "Gene Expression" a note says how many were left out.
    """

    type: Literal["10x"]
    path: str
    """A folder with matrix.mtx, genes.tsv or features.tsv, and barcodes.tsv (gzipped or not), an .h5 file, a folder of
    such folders and files, or a glob pattern: every match is a sample, whose name becomes dataset_id."""
    genome: str | None = None
    """Which genome to take where an output holds several."""
    obs: BarcodeTable | None = None
    """Table of what is known of the cells, .csv, .tsv or .parquet: a column `barcode`, `sample` if there are many, and
    the labels. Cells that are not in it have no labels."""
    columns: dict[str, str] = {}
    """Names to give to columns of that table, Census name -> name in the table."""


class SomaSource(StrictModel):
    """A SOMA experiment that exists, read where it is."""

    type: Literal["soma"]
    uri: str
    """Folder, or s3://bucket/experiment."""
    region: str | None = None
    """AWS region of an s3:// URI."""
    anonymous: bool = False
    """Read s3:// without an account, as public buckets are read. False looks for credentials where AWS's own tools do:
    AWS_* variables, ~/.aws, the machine's role. Keys never stand in a job file."""
    s3: S3Config = S3Config()
    """How an s3:// address is read."""
    measurement: str = "RNA"
    """Measurement of the experiment: ms[measurement]."""
    layer: str = "raw"
    """Layer of raw counts: ms[measurement].X[layer]."""


class CensusSource(StrictModel):
    """The CELLxGENE Census, opened by version from its public bucket; no account needed."""

    type: Literal["census"]
    version: str
    """A dated release such as 2025-01-30. "stable" and "latest" move: they are looked up once, and what they stood for
    is kept in the facts of the stage (census_version) and read by every later one."""
    organism: Literal["homo_sapiens", "mus_musculus"] = "homo_sapiens"
    """One organism is one experiment of the Census."""
    s3: S3Config = S3Config()
    """How the bucket is read."""


Source = Annotated[SyntheticSource | H5adSource | TenxSource | SomaSource | CensusSource, Field(discriminator="type")]


# ---- stages ------------------------------------------------------------------------------------------------------
Value = str | bool | int | float


class CellsConfig(StrictModel):
    """Which cells of the source; a cell must meet every condition, and obs_filter too."""

    is_primary_data: bool | None = None
    """true counts every cell of the Census once: it holds many twice, in collections of other data sets."""
    tissue: str | list[str] | None = None
    """Of the column tissue_general, for example [lung, blood]; finer ones: where: {tissue: …}."""
    assay: str | list[str] | None = None
    """For example ["10x 3' v2", "10x 3' v3"]."""
    organism: str | list[str] | None = None
    """Of the column organism. An experiment of the Census has one organism: there it is ingest.source.organism."""
    where: dict[str, Value | list[Value]] = {}
    """Any obs column: its value, or a list of values: {disease: normal, donor_id: [D1, D2]}."""

    def conditions(self) -> dict[str, list[Value]]:
        """Values that are let through, for each obs column that decides."""
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
    """source: the genes of the source. Or a file that lists them, in the order of their ids (.json, .txt, .csv, .tsv,
    .parquet, .h5ad), or the folder of a model, whose vocabulary the cells are then aligned to."""
    match: Literal["id", "symbol"] = "id"
    """How genes of a vocabulary are found in the source: by id (the version in ENSG….12 does not count), or by
    feature_name. A symbol that several genes of the source share finds none of them, and a note says so."""
    max_missing: float = Field(0.2, ge=0, le=1)
    """Largest share of a vocabulary's genes that the source may lack."""
    presence: bool = False
    """Whether a gene that a cell's data set did not measure is left out of that cell's likelihood and never shown to
    the encoder as a zero. What was measured: the file's genes for h5ad and 10x, the feature_dataset_presence_matrix for
    SOMA and the Census. False takes every absent count as a zero, and a note says where that is a guess."""
    value_filter: str | None = None
    """SOMA value filter on var, for example "feature_length > 500"."""
    min_cells: int = Field(0, ge=0)
    """Keep genes that at least so many training cells express. 0 keeps every gene of the source."""

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
    """Combinations of labels of which every cell is held out."""

    split: Literal["validation", "test"] = "test"
    """The side that the combinations go to."""
    combinations: list[dict[str, Value | list[Value]]] | None = None
    """Each a class, or a list of classes, for some obs columns: [{cell_type: CD4 Naive, cytokine: [IL-2, IFN-beta]}]
    holds out two combinations."""
    table: HeldOutTable | None = None
    """The same as a CSV or Parquet table: obs columns, one combination a row, an empty field for any class. A column
    `split` says validation or test for each row."""

    @model_validator(mode="after")
    def _said_once(self) -> HeldOutConfig:
        if (self.combinations is None) == (self.table is None):
            raise ValueError("give either combinations or table")
        if self.combinations is not None and not all(self.combinations or [{}]):
            raise ValueError("combinations must not be empty: a combination without a class is every cell's")
        return self


class SplitConfig(StrictModel):
    """Share of cells held out, by a hash of `by`: the same cell always falls on the same side."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Share of the cells that training is validated on."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share of the cells that are never trained on; evaluate compares with them."""
    by: Literal["cell", "tile", "donor_id", "dataset_id"] = "cell"
    """What is hashed. donor_id or dataset_id keep donors or data sets whole. cell scatters the held-out cells over the
    store, where reading them costs nearly as much as reading all; tile holds out whole storage tiles of 2,048
    neighbours, which read at full speed (or keep cell, and read from ingest.cache)."""
    salt: str = "scldm"
    """Another salt is another split."""
    held_out: HeldOutConfig | None = None
    """Combinations of labels that no training cell has. The other cells are split by hash; the share of the side that
    the combinations go to is then 0 unless it is given, so that they are not mixed with cells of the usual kind."""

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


class IngestConfig(StrictModel):
    """Vocabularies, split and statistics of a source; the counts stay in SOMA."""

    source: Source
    """Where the cells are; `type` says which kind of source."""
    labels: list[str] = ["cell_type"]
    """obs columns that generation is conditioned on."""
    cells: CellsConfig = CellsConfig()
    obs_filter: str | None = None
    """SOMA value filter on obs, for what `cells` cannot say: "n_genes > 500 or tissue_general == 'lung'"."""
    max_cells: PositiveInt | None = None
    """At most so many of the cells that are left, from few storage tiles but from 16 at least, so that a part of a
    large store is quick to read and still mixed. The same cells every time; null takes all. Files are written to SOMA
    whole, whatever is taken."""
    missing_label: Literal["error", "drop"] = "error"
    """What to do with cells that have no value for a label."""
    genes: GenesConfig = GenesConfig()
    split: SplitConfig = SplitConfig()
    cache: bool | str | None = None
    """Where all cells are written once as ragged shards, to be read from there in every epoch of every job, in the same
    order and the same batches: true for <output>/cache, or a folder that every node sees. Pays from the second epoch.
    null (or false) streams from SOMA. Jobs of the same cells and genes share a cache; turning it on or off makes
    another version of ingest."""
