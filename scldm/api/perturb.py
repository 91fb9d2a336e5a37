"""`Model.perturb`: real cells under another condition, as a perturb job computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch

from scldm.api.arguments import Arguments
from scldm.api.conditions import sampler_settings
from scldm.api.folders import ModelFolders, Weights
from scldm.api.parts import digests, each_batch, flat, made_cells, source_of, told
from scldm.checkpoints.asked_values import value_notes, with_values
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.align import AlignedCells, class_ids
from scldm.data.batch import CellBatch
from scldm.data.cell_counts import CellsError
from scldm.data.class_names import class_name
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.flow.config import SamplerConfig
from scldm.flow.guidance import guidance_terms
from scldm.generation.decoder_condition import refuse_adaln
from scldm.generation.perturbed import Perturbation, not_controls, perturb_cells, perturb_problems
from scldm.generation.request_table import RequestError, check_guidance
from scldm.nn.kernels.precision import Numerics

STARTS, COUNTS, UNKNOWN = ("latents", "noise", "control"), ("drawn", "changed"), ("error", "none")
SOLVER = {"solver": "midpoint", "steps": 20}  # as a perturb job


def read_perturbation(
    given: Arguments, to: Any, start: Any, counts: Any, guidance: Any, sampler: Any, seed: Any,
    *, vae: LoadedVAE, flow: LoadedFlow, weights: Weights,
) -> Perturbation:  # fmt: skip
    """Return what is done to cells.

    Args:
        given: Arguments of the call, with the problems of those that were checked before.

    Raises:
        RequestError: An argument cannot be used; all problems are listed.
    """
    refuse_adaln(vae.vae.config, "perturb")
    for name, value, allowed in (("start", start, STARTS), ("counts", counts, COUNTS)):
        given.one_of(name, value, allowed)
    seed = given.seed(seed)
    settings = sampler_settings(given, SOLVER if sampler is None else sampler, guidance, loaded=weights)
    classes = _classes(given, to, vae.vocabulary)
    names = [x.name for x in vae.vocabulary.labels]
    given.problems += [p.replace("generate.sampler.", "") for p in check_guidance(settings.guidance, names)]
    if not given.problems:
        given.problems += _flow_problems(classes, start, counts, settings, vae=vae, flow=flow)
    if given.problems:
        raise RequestError("\n".join(dict.fromkeys(given.problems)))
    return Perturbation(classes, start, counts, settings, seed)


def _classes(given: Arguments, to: Any, vocabulary: Vocabulary) -> dict[str, str | None]:
    """Return the new class of each label, as the model calls it."""
    if not isinstance(to, Mapping) or not to:
        given.problems.append(f"to must name labels and their new classes, {{'cytokine': 'IFN-beta'}}; got {to!r}")
        return {}
    found: dict[str, str | None] = {}
    for name, value in to.items():
        try:
            label = vocabulary.label(str(name))
            found[label.name] = None if (own := class_name(value)) is None else label.asked(own)
        except UnknownNameError as error:
            given.problems.append(f"to[{name!r}]: {error}")
    return found


def _flow_problems(
    to: Mapping[str, str | None], start: Any, counts: Any, sampler: SamplerConfig, *, vae: LoadedVAE, flow: LoadedFlow
) -> list[str]:
    problems = perturb_problems(
        to, start, flow.start, counts=counts, draws_counts=vae.vae.config.head != "gaussian", distilled=flow.distilled
    )  # fmt: skip
    if start == "noise" and counts == "changed":
        problems.append("counts='changed' changes a cell's counts by what its latents change, and start='noise' uses "
                        "none of the cell's; take counts='drawn' or start='latents'")  # fmt: skip
    try:
        guidance_terms([x.name for x in vae.vocabulary.labels], sampler.guidance, strategy=flow.dit.strategy)
    except ValueError as error:
        problems.append(str(error))
    return problems


def own_classes(
    adata: anndata.AnnData, vocabulary: Vocabulary, perturbation: Perturbation | None, flow: LoadedFlow,
    unknown_labels: str,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return the cells' own class ids by label, (b,).

    Args:
        perturbation: What is done to them; None: nothing that needs control cells.

    Raises:
        CellsError: Cells lack a label, and `unknown_labels` is error; or they are no control cells and should be.
    """
    if unknown_labels == "error":
        problems = [
            f"obs has no column {x.name!r}, a label of the model; to go without it: unknown_labels='none'"
            for x in vocabulary.labels
            if x.name not in adata.obs
        ]
        if problems:
            raise CellsError("\n".join(problems))
    ids = class_ids(adata, vocabulary)
    problems = []
    for label in vocabulary.labels if unknown_labels == "error" else ():
        if n := int((ids[label.name] == label.null_id).sum()):
            first = adata.obs_names[ids[label.name] == label.null_id][0]
            problems.append(f"{n:,} cells have no {label.name} (first: {first}); to use them without it: "
                            "unknown_labels='none'")  # fmt: skip
    if perturbation is not None and perturbation.start == "control" and flow.start is not None:
        own = vocabulary.label(flow.start.label).decode(ids[flow.start.label].tolist())
        if problem := not_controls(own, list(map(str, adata.obs_names)), flow.start):
            problems.append(f"{problem}. Select the control cells, or take start='latents'")
    if problems:
        raise CellsError("\n".join(problems))
    return ids


def perturbed(
    adata: anndata.AnnData, cells: AlignedCells, ids: Mapping[str, np.ndarray], perturbation: Perturbation,
    *, vae: LoadedVAE, flow: LoadedFlow, folders: ModelFolders, numerics: Numerics, kind: str = "perturb",
    as_measured: np.ndarray | None = None,
) -> anndata.AnnData:  # fmt: skip
    """Return the cells under their new labels.

    Args:
        cells: The cells' counts over the genes of the model.
        ids: Their own class ids, by label.
        numerics: What the networks are set to, for the provenance.
        kind: Name of what is done, for the provenance.
        as_measured: Cells that keep their counts and latents, (b,) bool; None: none do.
    """
    flow = with_values(flow, [perturbation.to])
    stay = np.zeros(adata.n_obs, dtype=bool) if as_measured is None else as_measured

    def moved(batch: CellBatch) -> tuple[sp.csr_matrix, np.ndarray]:
        made, z = perturb_cells(vae, flow, batch, batch, perturbation)
        new, rows = flat(z), batch.joinids.cpu().numpy()
        if (staying := np.flatnonzero(stay[rows])).size:
            return _as_measured(vae, batch, cells, staying, made, new)
        return made, new

    parts = list(each_batch(moved, vae, flow, cells, adata, ids))
    obs = adata.obs.copy()
    obs["is_synthetic"] = ~stay
    obs["library_size"] = np.asarray(cells.counts.sum(1)).ravel().astype(np.float32)
    for name, value in perturbation.to.items():
        obs[f"to_{name}"] = "" if value is None else value
    about = {
        "kind": kind, "seed": perturbation.seed, "sampler": perturbation.sampler.model_dump_json(),
        "to": {k: "" if v is None else v for k, v in perturbation.to.items()}, "start": perturbation.start,
        "counts": perturbation.counts, **digests(folders), **numerics.as_plain(),
        **source_of(folders),
        **told(value_notes(flow.vocabulary, [perturbation.to])),
    }  # fmt: skip
    return made_cells(vae, [p[0] for p in parts], [p[1] for p in parts], obs, about)


def _as_measured(
    vae: LoadedVAE, batch: CellBatch, cells: AlignedCells, staying: np.ndarray, values: sp.csr_matrix, z: np.ndarray
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return values and latents of a tile with its `staying` cells as they were measured."""
    own, changed = cells.counts[batch.joinids.cpu().numpy()].astype(np.int32), np.ones(len(z), dtype=bool)
    changed[staying] = False
    with torch.inference_mode():
        z[staying] = flat(vae.vae.encode(batch))[staying]
    rows = [(values if moved else own)[i] for i, moved in enumerate(changed.tolist())]
    return sp.csr_matrix(sp.vstack(rows, format="csr")), z
