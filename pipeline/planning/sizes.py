"""How large a job is, reckoned without running it: parameters, activations, disk. Memory: `pipeline.planning.memory`.

A figure that rests on an assumption is marked `about`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.job import (
    EncodeConfig,
    FlowTrainConfig,
    GenerateConfig,
    IngestConfig,
    SplitConfig,
    TrainConfig,
    TrainFlowConfig,
    TrainVaeConfig,
)
from pipeline.core.manifest import Manifest
from pipeline.planning.memory import dit_activations, vae_activations

ASSUMED_CLASSES = 100  # of a label that has not been read yet
ASSUMED_EXPRESSED = 2_000  # genes per cell, at most; of all genes at most this share:
ASSUMED_SHARE = 0.2
BYTES_PER_COUNT = 8  # CSR: int32 index and int32 count


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data before it is read."""

    n_cells: Mapping[str, int] | None = None  # by split
    n_genes: int | None = None
    n_classes: Mapping[str, int] | None = None
    expressed: float | None = None  # mean expressed genes of a cell
    source: str = "unknown until ingest has run"


def data_facts(ingest: Manifest | None, config: IngestConfig | None) -> DataFacts:
    """From the manifest of ingest where it is finished, else from the head of the source."""
    if ingest is not None and ingest.facts:
        f = ingest.facts
        return DataFacts(
            f.get("n_cells"), f.get("n_genes"), f.get("n_classes"), f.get("mean_expressed_genes"), "manifest"
        )
    source = config.source if config is not None else None
    if config is None or source is None:
        return DataFacts()
    if config.genes.vocabulary != "source":  # as many genes as the list has, whatever the source holds
        from pipeline.data.ingest.genes import read_vocabulary

        whole = config.model_copy(update={"genes": config.genes.model_copy(update={"vocabulary": "source"})})
        return replace(data_facts(None, whole), n_genes=len(read_vocabulary(config.genes.vocabulary).feature_ids))
    split = config.split
    if source.type == "synthetic":
        sizes = {"cell_type": source.n_types, "donor_id": source.n_donors}
        classes = {label: sizes.get(label, ASSUMED_CLASSES) for label in config.labels}
        return DataFacts(_by_split(source.n_cells, split), source.n_genes, classes, None, "synthetic source")
    if source.type == "h5ad" and Path(source.path).expanduser().is_file():
        n_cells, n_genes = _h5ad_shape(Path(source.path).expanduser(), raw=source.layer == "raw")
        return DataFacts(
            _by_split(n_cells, split), n_genes, dict.fromkeys(config.labels, ASSUMED_CLASSES), None, "head of the file"
        )
    return DataFacts()


def _h5ad_shape(path: Path, *, raw: bool) -> tuple[int | None, int | None]:
    import h5py

    def length(group: Any) -> int:
        return len(group[group.attrs["_index"]])

    try:
        with h5py.File(path, "r") as f:
            return length(f["obs"]), length(f["raw/var" if raw else "var"])
    except (OSError, KeyError):  # not an h5ad: ingest says so, with more to say than plan has
        return None, None


# ---- parameters and memory ---------------------------------------------------------------------------------------
def vae_parameters(config: TrainVaeConfig, data: DataFacts) -> int | None:
    if data.n_genes is None:
        return None
    import torch

    from scldm.nn.vae import VAE

    with torch.device("meta"):
        return _count(VAE(config.model, n_genes=data.n_genes))


def dit_parameters(config: TrainFlowConfig, vae: TrainVaeConfig, data: DataFacts) -> int | None:
    if data.n_classes is None:
        return None
    import torch

    from scldm.nn.dit import DiT

    m, e = vae.model.n_latent_tokens, vae.model.latent_width
    with torch.device("meta"):
        return _count(DiT(config.model, n_latent_tokens=m, latent_width=e, n_classes=dict(data.n_classes)))


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def checkpoint_bytes(n: int, train: TrainConfig) -> int:
    """Checkpoints kept: fp32 weights, optimizer state and, where there is one, the average; and the exported model."""
    average = 4 if isinstance(train, FlowTrainConfig) else 0
    one = n * (4 + 8 + average)
    return one * (train.keep_last + train.keep_best) + n * (4 + average)


def vae_step_bytes(config: TrainVaeConfig, data: DataFacts, workers: int) -> float | None:
    """Activations of a training step of the VAE, on one worker."""
    if data.n_genes is None:
        return None
    scored = min(config.train.genes_per_step or data.n_genes, data.n_genes)
    cells = _micro_batch(config.train, workers)
    return vae_activations(config.model, config.train, cells=cells, n_genes=scored, expressed=expressed_genes(data))


def joint_vae(flow: TrainFlowConfig, vae: TrainVaeConfig) -> TrainVaeConfig:
    """The VAE as `train_flow` with vae.train trains it."""
    shared = {"feed": flow.train.feed, "precision": flow.train.precision, "genes_per_step": flow.vae.genes_per_step}
    return vae.model_copy(update={"train": vae.train.model_copy(update=shared)})


def dit_step_bytes(config: TrainFlowConfig, vae: TrainVaeConfig, workers: int) -> float:
    """Activations of a training step of the flow, on one worker."""
    m, e = vae.model.n_latent_tokens, vae.model.latent_width
    cells = _micro_batch(config.train, workers)
    return dit_activations(config.model, config.train, cells=cells, n_latent_tokens=m, latent_width=e)


def _micro_batch(train: TrainConfig, workers: int) -> int:
    return min(train.feed.micro_batch_size, max(1, train.feed.batch_size // workers))


def expressed_genes(data: DataFacts) -> float:
    """Mean of a cell; assumed where the data has not been read."""
    return data.expressed or min(ASSUMED_EXPRESSED, ASSUMED_SHARE * (data.n_genes or 0))


# ---- disk --------------------------------------------------------------------------------------------------------
def latent_bytes(config: EncodeConfig, vae: TrainVaeConfig, data: DataFacts) -> int | None:
    if data.n_cells is None:
        return None
    cells = sum(data.n_cells.get(s, 0) for s in set(config.splits))
    return round(cells * vae.model.n_latent_tokens * vae.model.latent_width * 4)


def generated_cells(config: GenerateConfig, data: DataFacts) -> int | None:
    """Cells that generate would write; None if that takes reading a table."""
    if config.cells is not None:
        return sum(int(row.get("n_cells", 0)) for row in config.cells)
    if config.per_label is not None:
        classes = data.n_classes or {}
        return sum(n * classes[label] for label, n in config.per_label.items() if label in classes) or None
    if config.n_cells is not None:
        return config.n_cells
    if config.like is not None and data.n_cells is not None:
        return data.n_cells.get(config.like)
    return None


def _by_split(n_cells: int | None, split: SplitConfig) -> dict[str, int] | None:
    """The split is by hash, so these are expectations."""
    if n_cells is None:
        return None
    validation, test = round(n_cells * split.validation), round(n_cells * split.test)
    return {"train": n_cells - validation - test, "validation": validation, "test": test}
