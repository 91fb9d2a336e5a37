"""`Model.transform`: what the counts of cells would be in another donor or batch.

It is `Model.perturb` from the cells' own latents with changed counts, and two things differ. Cells that have the
reference class already keep their counts and latents, bit for bit, so that a corrected data set holds its reference as
it was measured; `is_synthetic` in obs says which cells were changed. And a label cannot be taken away (None): a cell
without a batch is in no batch that others could be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scldm.api.arguments import Arguments
from scldm.api.folders import Weights
from scldm.api.perturb import read_perturbation
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.vocabulary import Vocabulary
from scldm.generation.perturbed import Perturbation


def read_transform(
    given: Arguments, to: Any, guidance: Any, sampler: Any, seed: Any, *, vae: LoadedVAE, flow: LoadedFlow,
    weights: Weights,
) -> Perturbation:  # fmt: skip
    """Return what is done to cells.

    Raises:
        RequestError: An argument cannot be used; all problems are listed.
    """
    if isinstance(to, Mapping) and (without := [str(name) for name, value in to.items() if value is None]):
        given.problems.append(
            f"to must name a class of each label to correct cells to; {', '.join(without)} has None. Model.perturb "
            "goes without a label"
        )
    if vae.vae.config.head == "gaussian":
        given.problems.append(
            "transform changes counts of cells, and the model has a gaussian head, which models log1p CP10k values; "
            "Model.perturb(adata, to) draws such values"
        )
    counts = "changed" if vae.vae.config.head != "gaussian" else "drawn"  # the problem above says it
    return read_perturbation(given, to, "latents", counts, guidance, sampler, seed, vae=vae, flow=flow, weights=weights)


def already(ids: Mapping[str, np.ndarray], to: Mapping[str, str | None], vocabulary: Vocabulary) -> np.ndarray:
    """Return which cells have the classes of `to` already, (b,) bool.

    Args:
        ids: Class ids of the cells by label.
    """
    same = [ids[name] == _id(value, name, vocabulary) for name, value in to.items()]
    return np.all(same, axis=0)


def _id(value: str | None, name: str, vocabulary: Vocabulary) -> int:
    label = vocabulary.label(name)
    return int(label.encode([value])[0]) if value is None or label.knows(value) else -1  # asked for, not measured
