"""Compute the size of a job without running it: parameters, activations, disk. Memory is in `pipeline.planning.memory`.

A figure that rests on an assumption is marked `about`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from pipeline.config.train import DistilTrainConfig, FlowStartConfig
from pipeline.core.manifest import Manifest
from pipeline.planning.memory import dit_activations, vae_activations

ASSUMED_CLASSES = 100  # classes of a label that has not been read yet
ASSUMED_EXPRESSED = 2_000  # genes per cell, and at most ASSUMED_SHARE of all genes
ASSUMED_SHARE = 0.2
BYTES_PER_COUNT = 8  # CSR: int32 index and int32 count


@dataclass(frozen=True)
class DataFacts:
    """What is known about the data before it is read."""

    n_cells: Mapping[str, int] | None = None  # by split
    n_genes: int | None = None
    n_classes: Mapping[str, int] | None = None
    expressed: float | None = None  # mean expressed genes of a cell
    source: str = "unknown until ingest has run"
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # label -> facts, if its classes are values
    moved_to: tuple[str, ...] = ()  # splits with held-out combinations, whose cells are counted by ingest


def data_facts(ingest: Manifest | None, config: IngestConfig | None) -> DataFacts:
    """Return facts from the manifest of ingest if it is finished, else from the header of the source."""
    if ingest is not None and ingest.facts:
        f = ingest.facts
        return DataFacts(
            f.get("n_cells"), f.get("n_genes"), f.get("n_classes"), f.get("mean_expressed_genes"), "manifest",
            f.get("label_values", {}),
        )  # fmt: skip
    source = config.source if config is not None else None
    if config is None or source is None:
        return DataFacts()
    if config.genes.vocabulary != "source":  # the genes of the list, whatever the source holds
        from pipeline.data.ingest.genes import read_vocabulary

        whole = config.model_copy(update={"genes": config.genes.model_copy(update={"vocabulary": "source"})})
        return replace(data_facts(None, whole), n_genes=len(read_vocabulary(config.genes.vocabulary).feature_ids))
    if config.replay is not None:
        return _with_old_cells(data_facts(None, config.model_copy(update={"replay": None})), config.replay.share)
    split = config.split
    if source.type == "synthetic":
        sizes = {"cell_type": source.n_types, "donor_id": source.n_donors}
        classes = {label: sizes.get(label, ASSUMED_CLASSES) for label in config.labels}
        return DataFacts(
            _by_split(source.n_cells, split), source.n_genes, classes, None, "synthetic source",
            moved_to=_held_out_splits(split),
        )  # fmt: skip
    if source.type == "h5ad" and Path(source.path).expanduser().is_file():
        n_cells, n_genes = _h5ad_shape(Path(source.path).expanduser(), raw=source.layer == "raw")
        return DataFacts(
            _by_split(n_cells, split),
            n_genes,
            dict.fromkeys(config.labels, ASSUMED_CLASSES),
            None,
            "file header",
            moved_to=_held_out_splits(split),
        )
    return DataFacts()


def _h5ad_shape(path: Path, *, raw: bool) -> tuple[int | None, int | None]:
    import h5py

    def length(group: Any) -> int:
        return len(group[group.attrs["_index"]])

    try:
        with h5py.File(path, "r") as f:
            return length(f["obs"]), length(f["raw/var" if raw else "var"])
    except (OSError, KeyError):  # not an h5ad file: ingest explains that better than plan could
        return None, None


# ---- parameters and memory ---------------------------------------------------------------------------------------
def vae_parameters(config: TrainVaeConfig, data: DataFacts) -> int | None:
    """Count the parameters of the VAE; None if the number of genes is not known."""
    if data.n_genes is None:
        return None
    import torch

    from scldm.nn.vae import VAE

    with torch.device("meta"):
        return _count(VAE(config.model, n_genes=data.n_genes))


def dit_parameters(config: TrainFlowConfig, vae: TrainVaeConfig, data: DataFacts) -> int | None:
    """Count the parameters of the flow; None if the classes are not known."""
    if data.n_classes is None:
        return None
    import torch

    from scldm.nn.dit import ClassFeatures, DiT

    m, e = vae.model.n_latent_tokens, vae.model.latent_width
    with torch.device("meta"):
        features = {
            label: ClassFeatures(torch.empty(data.n_classes[label], about["n_features"]), about["type"] == "set")
            for label, about in data.values.items()
        }
        return _count(
            DiT(
                config.model,
                n_latent_tokens=m,
                latent_width=e,
                n_classes=dict(data.n_classes),
                features=features,
                from_controls=config.start is not None,
            )
        )


def control_bytes(start: FlowStartConfig, vae: TrainVaeConfig | None, data: DataFacts) -> int | None:
    """Return the most bytes of control cells' latents that a worker holds; None if the data are not known."""
    if vae is None or data.n_cells is None or data.n_classes is None:
        return None
    [label] = start.control
    groups = math.prod(n for name, n in data.n_classes.items() if name != label)
    most = min(groups * start.cells_per_group, data.n_cells.get("train", 0))
    return most * vae.model.n_latent_tokens * vae.model.latent_width * 4


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def checkpoint_bytes(n: int, train: TrainConfig) -> int:
    """Return the bytes of all checkpoints that are kept, and of the exported model.

    A checkpoint holds fp32 weights, the optimizer's state and, for a flow, the average of the weights.
    """
    average = 4 if isinstance(train, (FlowTrainConfig, DistilTrainConfig)) else 0
    one = n * (4 + 8 + average)
    return one * (train.keep_last + train.keep_best) + n * (4 + average)


def vae_step_bytes(config: TrainVaeConfig, data: DataFacts, workers: int) -> float | None:
    """Return the bytes of activations in a training step of the VAE, on one worker."""
    if data.n_genes is None:
        return None
    scored = min(config.train.genes_per_step or data.n_genes, data.n_genes)
    cells = _micro_batch(config.train, workers)
    return vae_activations(config.model, config.train, cells=cells, n_genes=scored, expressed=expressed_genes(data))


def joint_vae(flow: TrainFlowConfig, vae: TrainVaeConfig) -> TrainVaeConfig:
    """Return the settings with which `train_flow` trains the VAE if vae.train is set."""
    shared = {"feed": flow.train.feed, "precision": flow.train.precision, "genes_per_step": flow.vae.genes_per_step}
    return vae.model_copy(update={"train": vae.train.model_copy(update=shared)})


def dit_step_bytes(config: TrainFlowConfig, vae: TrainVaeConfig, workers: int) -> float:
    """Return the bytes of activations in a training step of the flow, on one worker."""
    m, e = vae.model.n_latent_tokens, vae.model.latent_width
    cells = _micro_batch(config.train, workers)
    return dit_activations(config.model, config.train, cells=cells, n_latent_tokens=m, latent_width=e)


def micro_batches(train: TrainConfig, workers: int) -> tuple[int, int]:
    """Return the cells of a worker's micro batch, and its micro batches in a step."""
    cells = _micro_batch(train, workers)
    return cells, math.ceil(max(1, train.feed.batch_size // workers) / cells)


def _micro_batch(train: TrainConfig, workers: int) -> int:
    return min(train.feed.micro_batch_size, max(1, train.feed.batch_size // workers))


def expressed_genes(data: DataFacts) -> float:
    """Return the mean number of expressed genes in a cell; assumed if the data has not been read."""
    return data.expressed or min(ASSUMED_EXPRESSED, ASSUMED_SHARE * (data.n_genes or 0))


# ---- disk --------------------------------------------------------------------------------------------------------
def latent_bytes(config: EncodeConfig, vae: TrainVaeConfig, data: DataFacts) -> int | None:
    """Return the bytes of the latent cache; None if the number of cells is not known."""
    if data.n_cells is None:
        return None
    cells = sum(data.n_cells.get(s, 0) for s in set(config.splits))
    width = 2 if config.latents == "float16" else 4
    return round(cells * vae.model.n_latent_tokens * vae.model.latent_width * width)


def generated_cells(config: GenerateConfig, data: DataFacts) -> int | None:
    """Return the number of cells that generate would write; None if only its table or the data tells."""
    if config.cells is not None:
        return sum(int(row.get("n_cells", 0)) for row in config.cells)
    if config.per_label is not None:
        classes = data.n_classes or {}
        return sum(n * classes[label] for label, n in config.per_label.items() if label in classes) or None
    if config.n_cells is not None:
        return config.n_cells
    if config.like is not None and data.n_cells is not None and config.like not in data.moved_to:
        return data.n_cells.get(config.like)
    return None


def _with_old_cells(data: DataFacts, share: float) -> DataFacts:
    """Add the old cells of ingest.replay, whose classes are not known."""
    if data.n_cells is None:
        return data
    train = data.n_cells["train"] + round(share / (1 - share) * data.n_cells["train"])
    return replace(data, n_cells={**data.n_cells, "train": train})


def _held_out_splits(split: SplitConfig) -> tuple[str, ...]:
    """Return the splits that held-out combinations may be moved to."""
    if split.held_out is None:
        return ()
    return ("validation", "test") if split.held_out.table is not None else (split.held_out.split,)


def _by_split(n_cells: int | None, split: SplitConfig) -> dict[str, int] | None:
    """Return the expected number of cells in each split; the split itself is by hash."""
    if n_cells is None:
        return None
    validation, test = round(n_cells * split.validation), round(n_cells * split.test)
    return {"train": n_cells - validation - test, "validation": validation, "test": test}
