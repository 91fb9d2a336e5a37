"""Query mapping: labels of reference cells, transferred to query cells in the latent space of a model.

* The classifier is multinomial logistic regression on standardised latents. Its strength of L2 is the one with the
  lowest cross-fitted loss.
* Probabilities are calibrated by temperature scaling (Guo et al. 2017): the temperature minimises the loss of reference
  cells under classifiers that did not see them. It holds for query cells that are like the reference.
* Novelty compares a cell with its surroundings, as the local outlier factor does (Breunig et al. 2000): its mean
  distance to its nearest reference cells over theirs to their own. The score is the share of reference cells, each left
  out of its own neighbours, that are less isolated: 0.95 is passed by 5 % of cells that are drawn as the reference was.

Shape letters: n reference cells, b query cells, p latent numbers of a cell, k classes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scldm.api.arguments import Arguments
from scldm.api.folders import MANIFEST, ModelFolders
from scldm.data.align import AlignedCells, align
from scldm.data.cell_counts import CellsError
from scldm.data.class_names import class_names
from scldm.data.vocabulary import Vocabulary
from scldm.errors import CheckpointError, extra
from scldm.text import choices_hint

with extra("score"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestNeighbors

ABOUT = "scldm_mapping"  # entry of uns: what the mapping of each label was fitted to
FOLDS, STRENGTHS = 5, (0.1, 1.0)  # of the cross-fit; C of the logistic regression
NEIGHBOURS, BINS = 15, 15
FEWEST, MOST = 20, 20_000  # reference cells; more are drawn from by seed
MANY = 0.2  # share of novel cells that is warned of
COLD, HOT = np.log(0.1), np.log(100.0)  # log of the lowest and highest temperature


@dataclass(frozen=True)
class Reference:
    """Latents of reference cells with their labels."""

    latents: np.ndarray  # (n, p) float32
    labels: Mapping[str, pd.Categorical]  # (n,) each

    def drawn(self, most: int, seed: int) -> Reference:
        """Return the cells that have a label; of more than `most`, as many drawn by seed."""
        rows = np.flatnonzero(np.any([values.codes >= 0 for values in self.labels.values()], axis=0))
        if len(rows) > most:
            rows = np.sort(np.random.default_rng(seed).permutation(rows)[:most])
        return Reference(self.latents[rows], {name: values[rows] for name, values in self.labels.items()})


# ---- the classifier of a label ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LabelTransfer:
    """A calibrated classifier of one label."""

    model: LogisticRegression
    mean: np.ndarray  # (p,)
    deviation: np.ndarray  # (p,)
    codes: np.ndarray  # (k,) codes of its classes
    temperature: float
    about: Mapping[str, float]  # n_cells, n_classes, and accuracy and calibration of cells that were left out

    @classmethod
    def fit(cls, latents: np.ndarray, codes: np.ndarray, *, seed: int) -> LabelTransfer:
        """Fit the classifier to cells and its temperature to cells that were left out.

        Args:
            latents: (n, p).
            codes: Classes, (n,); at least two.
            seed: Deals the cells to folds.
        """
        mean, deviation = latents.mean(0), np.maximum(latents.std(0), 1e-6)
        x = (latents - mean) / deviation
        classes, ids = np.unique(codes, return_inverse=True)
        folds = deal(ids, seed)
        out = np.flatnonzero(folds >= 0)
        best = None
        for strength in STRENGTHS:
            logits = left_out_logits(x, ids, folds, strength)[out]
            temperature, loss = fit_temperature(logits, ids[out])
            if best is None or loss < best[0]:
                best = loss, strength, temperature, logits
        assert best is not None
        _, strength, temperature, logits = best
        found = np.exp(log_softmax(logits / temperature, axis=1))
        about = {
            "n_cells": len(ids), "n_classes": len(classes), "temperature": temperature,
            "left_out_accuracy": float((found.argmax(1) == ids[out]).mean()),
            "left_out_ece": calibration_error(found, ids[out]),
        }  # fmt: skip
        return cls(logistic(x, ids, strength), mean, deviation, classes, temperature, about)

    def probabilities(self, latents: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities of the classes, (b, k); latents are (b, p)."""
        if not len(latents):
            return np.zeros((0, len(self.codes)))
        logits = logits_of(self.model, (latents - self.mean) / self.deviation)
        return np.exp(log_softmax(logits / self.temperature, axis=1))


def logistic(x: np.ndarray, ids: np.ndarray, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=1000).fit(x, ids)


def logits_of(model: LogisticRegression, x: np.ndarray) -> np.ndarray:
    """Return logits of the model's classes, (b, k), for two classes as well."""
    found = model.decision_function(x)
    return np.stack([np.zeros_like(found), found], axis=1) if found.ndim == 1 else found


def deal(ids: np.ndarray, seed: int) -> np.ndarray:
    """Deal the cells of each class to folds, (n,); the only cell of a class is never left out, -1."""
    rng = np.random.default_rng(seed)
    folds = np.full(len(ids), -1)
    for k in np.unique(ids):
        rows = rng.permutation(np.flatnonzero(ids == k))
        if len(rows) > 1:
            folds[rows] = np.arange(len(rows)) % FOLDS
    return folds


def left_out_logits(x: np.ndarray, ids: np.ndarray, folds: np.ndarray, strength: float) -> np.ndarray:
    """Return logits of every cell, (n, k), under a classifier that did not see it; zeros for cells without a fold."""
    logits = np.zeros((len(ids), ids.max() + 1))
    for fold in np.unique(folds[folds >= 0]):
        out = folds == fold
        logits[out] = logits_of(logistic(x[~out], ids[~out], strength), x[out])
    return logits


def fit_temperature(logits: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """Return the temperature of the lowest mean negative log-likelihood, and that in nats per cell."""

    def loss(log_temperature: float) -> float:
        found = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-found[np.arange(len(ids)), ids].mean())

    found = minimize_scalar(loss, bounds=(COLD, HOT), method="bounded")
    return float(np.exp(found.x)), float(found.fun)


def calibration_error(probabilities: np.ndarray, ids: np.ndarray) -> float:
    """Return the expected calibration error: |accuracy - confidence| in 15 equal bins of confidence, by cells."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == ids
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(right[bins == i].mean() - confidence[bins == i].mean()) * (bins == i).mean() for i in np.unique(bins)]
    return float(np.sum(gaps))


# ---- novelty ------------------------------------------------------------------------------------------------------
class Novelty:
    """How far cells lie from the reference, compared with the reference's own cells."""

    def __init__(self, latents: np.ndarray):
        self.mean, self.deviation = latents.mean(0), np.maximum(latents.std(0), 1e-6)
        x = (latents - self.mean) / self.deviation
        self.k = min(NEIGHBOURS, len(x) - 1)
        self.index = NearestNeighbors(n_neighbors=self.k).fit(x)
        distances, neighbours = self.index.kneighbors()  # of each cell, itself left out
        self.own = np.maximum(distances.mean(1), 1e-9)
        self.known = np.sort(self._isolation(distances, neighbours))

    def score(self, latents: np.ndarray) -> np.ndarray:
        """Return the share of reference cells that are less isolated than each of the latents (b, p), (b,) float32."""
        if not len(latents):
            return np.zeros(0, np.float32)
        isolation = self._isolation(*self.index.kneighbors((latents - self.mean) / self.deviation))
        return (np.searchsorted(self.known, isolation) / len(self.known)).astype(np.float32)

    def _isolation(self, distances: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
        return distances.mean(1) / self.own[neighbours].mean(1)


# ---- the mapping --------------------------------------------------------------------------------------------------
def aligned(
    cells: Mapping[str, tuple[anndata.AnnData, str | None]], vocabulary: Vocabulary, **how: Any
) -> dict[str, AlignedCells]:  # fmt: skip
    """Return the counts of sets of cells over the genes of a model.

    Args:
        cells: Name of a set -> its cells and the layer of their counts.
        how: Other arguments of `align`.

    Raises:
        CellsError: The model cannot use some of them; what is wrong with each set is said.
    """
    found, problems = {}, []
    for name, (adata, layer) in cells.items():
        try:
            found[name] = align(adata, vocabulary, layer=layer, **how)
        except CellsError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise CellsError("\n".join(problems))
    return found


def read_labels(
    given: Arguments, query: Any, reference: Any, labels: Any, *, vocabulary: Vocabulary
) -> list[str]:  # fmt: skip
    """Check which labels are transferred, and that the query's obs has room for the answer; returns the labels.

    Args:
        given: Collects what is wrong.
        reference: AnnData, or None for the cells that the model was trained on.
        labels: A name, names, or None for those of the model that the reference has.
    """
    wanted = [labels] if isinstance(labels, str) else labels
    if wanted is not None and not (isinstance(wanted, Sequence) and wanted and all(isinstance(x, str) for x in wanted)):
        given.problems.append(f"labels must be names of obs columns of the reference; got {labels!r}")
        return []
    own = [x.name for x in vocabulary.labels]
    columns = own if reference is None else list(getattr(reference, "obs", ()))
    found = list(dict.fromkeys(wanted)) if wanted is not None else [name for name in own if name in columns]
    whose = "the cells that the model was trained on have" if reference is None else "reference.obs has"
    given.problems += [
        f"labels: {whose} no {name!r}; {choices_hint(name, map(str, columns))}" for name in found if name not in columns
    ]
    if not found and not given.problems:
        given.problems.append(
            f"labels: reference.obs has none of the model's labels ({', '.join(own) or 'it has none'}); name obs "
            f"columns of the reference ({', '.join(map(str, columns)) or 'it has none'})"
        )
    if isinstance(query, anndata.AnnData) and ABOUT not in query.uns:  # else an earlier mapping wrote them
        taken = [name for name in columns_of(found) if name in query.obs]
        given.problems += [
            f"query.obs has a column {name!r}, which the mapping would write; rename it" for name in taken
        ]
    if reference is not None and not given.problems:
        given.problems += label_problems({name: categories_of(reference.obs[name]) for name in found}, "reference.obs")
    return found


def columns_of(labels: Sequence[str]) -> list[str]:
    """Return the columns of obs that a mapping writes."""
    return [*(x for name in labels for x in (f"mapped_{name}", f"mapped_{name}_probability")), "novelty", "is_novel"]


def categories_of(column: pd.Series) -> pd.Categorical:
    """Return a column as categories, in their order and of their type; a null and an empty text are no class."""
    found = pd.Categorical(column)
    empty = np.array([name is None for name in class_names(found.categories)], dtype=bool)
    return found.remove_categories(found.categories[empty]) if empty.any() else found


def label_problems(labels: Mapping[str, pd.Categorical], where: str) -> list[str]:
    """Return what is wrong with labels of a reference."""
    problems = []
    for name, values in labels.items():
        known = values.codes[values.codes >= 0]
        n_classes = len(np.unique(known))
        if n_classes < 2:
            problems.append(f"{where}[{name!r}] has {n_classes} classes among its cells; a transfer needs two or more")
        elif len(known) < FEWEST:
            problems.append(f"{where}[{name!r}] is known of {len(known)} cells; a transfer needs {FEWEST} or more")
        elif np.bincount(known).max() == 1:
            problems.append(f"{where}[{name!r}] is another for each cell: it names cells, not classes")
    return problems


def trained_on(folders: ModelFolders, labels: Sequence[str]) -> Reference:
    """Return the cached latents of the cells that a pipeline trained a model on, with their labels.

    Raises:
        CheckpointError: The model is not in the folder of the pipeline that trained it, or cells were not encoded.
    """
    with extra("cells"):
        import pyarrow as pa

    remedy = "give cells with labels: map(query, reference=adata)"
    stage = folders.vae.parent  # <pipeline>/train_vae/<version>/model
    pipeline = stage.parent.parent
    found = [m for m in map(_json, pipeline.glob(f"encode/*/{MANIFEST}")) if m["inputs"].get("train_vae") == stage.name]
    if not (stage / MANIFEST).is_file() or not found:
        raise CheckpointError(
            f"{folders.vae} is not in a pipeline that encoded the cells it was trained on, so there is no reference; "
            f"{remedy}"
        )
    newest = max(found, key=lambda m: float(m["finished_at"]))
    folder = pipeline / "encode" / str(newest["version"]) / str(newest["facts"]["latents"])
    ingest = pipeline / "ingest" / str(newest["inputs"]["ingest"])
    try:
        vocabulary = Vocabulary.load(ingest / str(_json(ingest / MANIFEST)["facts"]["vocabulary"]))
        shards = [shard for split in newest["facts"]["shards"].values() for shard in split]
        table = pa.concat_tables([pa.ipc.open_file(folder / shard["file"]).read_all() for shard in shards])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); {remedy}") from error
    values = table["latent"].combine_chunks()
    latents = values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1).astype(np.float32)
    reference = Reference(latents, {name: _of_codes(table, vocabulary, name) for name in labels})
    if problems := label_problems(reference.labels, f"cells of {pipeline}: label"):
        raise CheckpointError("\n".join([*problems, remedy]))
    return reference


def _of_codes(table: Any, vocabulary: Vocabulary, name: str) -> pd.Categorical:
    classes = next((x.classes for x in vocabulary.labels if x.name == name), ())
    codes = table[f"label:{name}"].to_numpy()
    return pd.Categorical.from_codes(np.where(codes < len(classes), codes, -1), categories=list(classes))


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write_mapping(
    query: anndata.AnnData, latents: np.ndarray, reference: Reference, *, novel_above: float, seed: int
) -> None:  # fmt: skip
    """Write transferred labels, their probabilities and novelty into the query's obs; what was fitted goes into uns.

    Args:
        latents: Of the query, (b, p).
        novel_above: Novelty above which a cell is called novel.
        seed: Deals reference cells to folds, and draws from very many.
    """
    reference = reference.drawn(MOST, seed)
    about = {}
    for name, values in reference.labels.items():
        known = values.codes >= 0
        transfer = LabelTransfer.fit(reference.latents[known], values.codes[known], seed=seed)
        found = transfer.probabilities(latents)
        codes = transfer.codes[found.argmax(1)]
        query.obs[f"mapped_{name}"] = pd.Categorical.from_codes(codes, dtype=values.dtype)
        query.obs[f"mapped_{name}_probability"] = found.max(1).astype(np.float32)
        about[name] = transfer.about
    query.obs["novelty"] = Novelty(reference.latents).score(latents)
    query.obs["is_novel"] = query.obs["novelty"].to_numpy() > novel_above
    table = pd.DataFrame.from_dict(about, orient="index").astype({"n_cells": int, "n_classes": int})
    query.uns[ABOUT] = table.assign(novel_above=novel_above)
    if (share := float(query.obs["is_novel"].mean())) > MANY:
        warnings.warn(
            f"{share:.0%} of the query's cells are farther from the reference than {novel_above:.0%} of its own cells "
            "are from each other (obs['is_novel']): of types that it lacks, or of another kind of sample; what they "
            "are mapped to is a guess, whatever its probability",
            stacklevel=3,
        )
