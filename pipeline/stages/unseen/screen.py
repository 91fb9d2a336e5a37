"""Reads the training cells of a pipeline as a perturbation screen: contexts, treatments, latents.

The labels of `control` are the treatment, all others together the context.

Shape letters: n cells, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pipeline.config.apply import PerturbConfig
from pipeline.config.context import StageContext
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.blocks import LABEL
from pipeline.inference.models import target_classes
from pipeline.inference.rows import SourceRows
from pipeline.report.combinations import JOIN
from pipeline.stages.unseen.asked import Measured, known_control
from pipeline.training.tasks.flow import latent_blocks
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.metrics.perturbation.screen import MIN_CELLS, Combination, Screen

MOST_CELLS = 50_000  # training cells that a perturb job learns from, drawn by seed


@dataclass(frozen=True)
class TrainingScreen:
    """Training cells with the names of their contexts and treatments."""

    screen: Screen
    joinids: np.ndarray  # (n,) int64
    ids: Mapping[str, Tensor]  # label -> class ids (n,)
    vocabulary: Vocabulary
    context: tuple[str, ...]  # labels
    treatment: tuple[str, ...]  # labels
    contexts: Mapping[str, tuple[str, ...]]  # name of a context -> its classes
    treatments: Mapping[str, tuple[str, ...]]  # name of a treatment -> its classes

    def classes(self, pair: Combination) -> dict[str, str]:
        """Return the class of each label in a combination whose context and treatment are among the cells."""
        given = dict(
            zip((*self.context, *self.treatment), (*self.contexts[pair[0]], *self.treatments[pair[1]]), strict=True)
        )
        return {label.name: given[label.name] for label in self.vocabulary.labels}

    @property
    def measured(self) -> Measured:
        """How many of these cells every combination has."""
        return Measured(self.screen.numbers, self.vocabulary, self.context, self.treatment)

    def pair(self, classes: Mapping[str, str]) -> Combination:
        """Return the combination of some classes, one for each label."""
        return self.measured.pair(classes)


def read_screen(ingest: Manifest, control: Mapping[str, str], *, max_cells: int | None, seed: int) -> TrainingScreen:
    """Read the training cells.

    Args:
        ingest: Manifest of the ingest.
        control: Label -> control class.
        max_cells: Cells at most, drawn by seed.
        seed: Seed of the draw.

    Raises:
        InputError: The control names no label or class of the data, or no label is left for the context.
    """
    data = IngestedDataset.open(ingest)
    control = known_control(data.vocabulary, control)
    names = [label.name for label in data.vocabulary.labels]
    treatment = tuple(x for x in names if x in control)
    context = tuple(x for x in names if x not in control)
    cells = data.anndata("train", max_cells=max_cells, seed=seed)
    columns = {x: cells.obs[x].astype(str).to_numpy() for x in names}
    rows = [list(zip(*(columns[x].tolist() for x in part), strict=True)) for part in (context, treatment)]
    joined = [np.array([JOIN.join(row) for row in part]) for part in rows]
    classes = [{JOIN.join(row): row for row in part} for part in rows]
    ids = {
        label.name: torch.from_numpy(label.encode(columns[label.name].tolist()).astype(np.int64))
        for label in data.vocabulary.labels
    }
    screen = Screen(sp.csr_matrix(cells.X), joined[0], joined[1], JOIN.join(control[x] for x in treatment))
    joinids = cells.obs_names.to_numpy().astype(np.int64)
    return TrainingScreen(screen, joinids, ids, data.vocabulary, context, treatment, *classes)


def read_target_screen(
    config: PerturbConfig, context: StageContext, rows: SourceRows, vocabulary: Vocabulary
) -> TrainingScreen:
    """Read the training cells for a perturb job; the treatment is what `to` changes.

    Args:
        rows: The source of the job, with at least one cell.
    """
    labels = [vocabulary.label(name) for name in config.to]
    own = {x.name: x.classes[rows.table[LABEL + x.name].iloc[0]] for x in labels}
    return read_screen(context.inputs["ingest"], own, max_cells=MOST_CELLS, seed=context.seed)


def target_of(config: PerturbConfig, vocabulary: Vocabulary) -> dict[str, str]:
    """Return the classes of `to`, as the data call them, without labels that are removed."""
    return {name: value for name, value in target_classes(config, vocabulary).items() if value is not None}


@dataclass(frozen=True)
class SourceCombination:
    """Cells of a source that have the same labels, and what they are to become."""

    rows: np.ndarray  # positions in the source
    key: np.ndarray  # class ids, in the order of the labels
    context: str
    control: str  # the treatment that the cells have
    treatment: str  # the one that is asked for

    @property
    def name(self) -> str:
        """Context and control, and the treatment that they are to have."""
        return f"{JOIN.join((self.context, self.control))} to {self.treatment}"


def source_combinations(rows: SourceRows, known: TrainingScreen, to: Mapping[str, str]) -> list[SourceCombination]:
    """Return the combinations of the cells of a source.

    Args:
        rows: The source.
        known: Training cells, from which a treatment's effect in other contexts is learned.
        to: Label -> new class.

    Raises:
        InputError: The training cells say nothing of some of them; all are listed.
    """
    labels = known.vocabulary.labels
    keys, which = np.unique(rows.table[[LABEL + x.name for x in labels]].to_numpy(), axis=0, return_inverse=True)
    found, problems = [], []
    treated = {t for _, t in known.screen.members}
    for i, key in enumerate(keys):
        own = {label.name: label.classes[k] for label, k in zip(labels, key, strict=True)}
        (context, control), (_, treatment) = known.pair(own), known.pair({**own, **to})
        at = np.flatnonzero(which == i)
        where = f"source: {len(at)} cells are {JOIN.join((context, control))}"
        if control not in treated:
            problems.append(f"{where}, and no training cell is {control}, where the shift starts; leave them out")
        elif not replace(known.screen, control=control).sources(context, treatment):
            problems.append(
                f"{where}; no other context has {MIN_CELLS} training cells of both {treatment} and {control}, so that "
                "nothing is known of this shift"
            )
        found.append(SourceCombination(at, key, context, control, treatment))
    if problems:
        raise InputError("\n".join(problems))
    return found


def read_latents(encode: Manifest, joinids: np.ndarray) -> Tensor:
    """Read the latents of training cells, (n, m, e), from the cache.

    Args:
        encode: Manifest of encode.
        joinids: Cells to read, (n,).

    Raises:
        InputError: The cache lacks some of them.
    """
    blocks = latent_blocks(encode, "train")
    table = blocks.read(blocks.ids)
    cached = table["soma_joinid"].to_numpy()
    order = np.argsort(cached, kind="stable")
    at = np.minimum(np.searchsorted(cached[order], joinids), len(cached) - 1)
    rows = order[at]
    if (missing := cached[rows] != joinids).any():
        raise InputError(
            f"the latent cache {encode.folder} lacks {int(missing.sum())} of {len(joinids)} training cells; delete it "
            "and run encode again"
        )
    latents = table["latent"].combine_chunks().flatten().to_numpy().reshape(len(cached), *encode.facts["latent_shape"])
    return torch.from_numpy(latents[rows].astype(np.float32))
