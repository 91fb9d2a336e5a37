"""Reads the training cells of a pipeline as a perturbation screen: contexts, treatments, latents.

The labels of `control` are the treatment, all others together the context.

Shape letters: n cells, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.report.combinations import JOIN
from pipeline.training.tasks.flow import latent_blocks
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import InputError
from scldm.metrics.perturbation.screen import Combination, Screen


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

    def pair(self, classes: Mapping[str, str]) -> Combination:
        """Return the combination of some classes, one for each label."""
        return JOIN.join(classes[x] for x in self.context), JOIN.join(classes[x] for x in self.treatment)


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
    control = _known_control(data.vocabulary, control)
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


def _known_control(vocabulary: Vocabulary, control: Mapping[str, str]) -> dict[str, str]:
    problems = []
    for name, value in control.items():
        try:
            vocabulary.label(name).encode([value])
        except UnknownNameError as error:
            problems.append(f"control.{name}: {error}")
    left = [label.name for label in vocabulary.labels if label.name not in control]
    if not problems and not left:
        problems.append(
            f"control names all labels of the data ({', '.join(control)}): what is left is the context, and a "
            "combination needs one; ingest with a label for the cell type, donor or cell line too"
        )
    if problems:
        raise InputError("\n".join(problems))
    return dict(control)


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


def require_askable(found: Sequence[Combination], control: str) -> None:
    """Raise InputError if no measured combination can be left out."""
    if not found:
        raise InputError(
            "no measured combination can be left out: one needs at least 20 training cells, as many control cells "
            f"({control}) of its context, and another context with its treatment and controls. Check control, or raise "
            "max_cells"
        )
