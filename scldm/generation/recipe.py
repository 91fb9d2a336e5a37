"""Turn a request in names into a recipe in numbers for `CellMaker`, and into the obs of the cells.

Shape letters: b cells, r rows of the request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import Vocabulary
from scldm.flow.config import Distilled
from scldm.flow.distilled import guidance_remedy
from scldm.flow.guidance import JOINT, NAME_JOINT, ONE_AT_A_TIME
from scldm.generation.cell_maker import Recipe
from scldm.generation.request import Request, RequestRow, Settings
from scldm.generation.request_table import GUIDANCE, RequestError
from scldm.nn.kernels.precision import Precision


def recipe_of(
    request: Request, settings: Settings, vocabulary: Vocabulary, sizes: LibrarySizes, strategy: str,
    *, counts: bool = True, distilled: Distilled | None = None,
) -> Recipe:  # fmt: skip
    """Return class ids, guidance and library-size statistics of every row.

    Args:
        counts: Whether counts are drawn; the expression of a Gaussian head has no library size.
        distilled: Of a flow that was distilled, which has one guidance only.

    Raises:
        RequestError: Guidance differs between labels of a model that guides them jointly, without a scale of all
            labels together; it is another one than was trained into a distilled flow; library sizes from statistics
            that the model has not got.
    """
    rows = request.rows
    ids = {x.name: x.encode([r.condition.get(x.name) for r in rows]) for x in vocabulary.labels}
    scale = _scales(rows, settings, vocabulary, strategy)
    if distilled is not None:
        _require_own_guidance(rows, scale, distilled, vocabulary, strategy)
    library = np.array(
        [_library(r, settings, sizes) if counts else (0.0, 0.0) for r in rows], dtype=np.float64
    ).reshape(-1, 2)
    return Recipe(
        stops=np.cumsum([r.n_cells for r in rows]).astype(np.int64),
        conditions=ids,
        scale=scale,
        log_mean=library[:, 0],
        log_sd=library[:, 1],
    )


def named_after(prefix: str, precision: Precision) -> str:
    """Return the prefix of cells' names in a precision; that of fp32 is as before there were others."""
    if precision == "fp32":
        return prefix
    return hashlib.sha256(f"{prefix} {precision}".encode()).hexdigest()[:8]


def row_guidance(row: RequestRow, settings: Settings, labels: list[str]) -> dict[str, float]:
    """Return the scale of every label in a row: the row's for the label, else the row's for all, else the settings'.

    If the row, or else the settings, give a scale to all labels together (JOINT), it is among them, and a label that
    nobody gives one has 0.
    """
    default = settings.guidance if isinstance(settings.guidance, Mapping) else dict.fromkeys(labels, settings.guidance)
    if JOINT in row.guidance or (JOINT in default and "" not in row.guidance):
        beside = default if JOINT in default else {}
        return {x: row.guidance.get(x, beside.get(x, 0.0)) for x in (JOINT, *labels)}
    return {label: row.guidance.get(label, row.guidance.get("", default.get(label, 0.0))) for label in labels}


def _scales(
    rows: tuple[RequestRow, ...], settings: Settings, vocabulary: Vocabulary, strategy: str
) -> dict[str, np.ndarray]:
    labels = [x.name for x in vocabulary.labels]
    if not labels:
        return {}
    found = [row_guidance(r, settings, labels) for r in rows]
    if strategy != "joint":
        if any(JOINT in w for w in found):
            raise RequestError(f"generate: guidance: {ONE_AT_A_TIME}")
        return {label: np.array([w[label] for w in found], dtype=np.float64) for label in labels}
    scales = [_joint_scales(i, row, w, labels) for i, (row, w) in enumerate(zip(rows, found, strict=True))]
    beside = [x for x in labels if any(w.get(x, 0.0) for w in scales)]
    return {x: np.array([w.get(x, 0.0) for w in scales], dtype=np.float64) for x in (JOINT, *beside)}


def _require_own_guidance(
    rows: tuple[RequestRow, ...], scale: dict[str, np.ndarray], distilled: Distilled, vocabulary: Vocabulary,
    strategy: str,
) -> None:  # fmt: skip
    """Raise RequestError for rows whose guidance is not the one that was trained into a distilled flow.

    Args:
        scale: Label (or JOINT) -> scale of each row, (r,).
    """
    plain = tuple(RequestRow(row.condition, row.n_cells) for row in rows)
    own = _scales(plain, Settings(distilled.guidance), vocabulary, strategy)
    zeros = np.zeros(len(rows))
    given = {
        x.name: np.array([r.condition.get(x.name) is not None for r in rows], dtype=bool) for x in vocabulary.labels
    }
    any_given = np.any(list(given.values()), axis=0) if given else np.zeros(len(rows), dtype=bool)
    other = np.zeros(len(rows), dtype=bool)
    for name in {*scale, *own}:  # of a label that a row does not have, the scale means nothing
        differs = scale.get(name, zeros) != own.get(name, zeros)
        other |= differs & given.get(name, any_given)
    if other.any():
        first = [str(i + 1) for i in np.flatnonzero(other)[:5]]
        more = ", …" if other.sum() > 5 else ""
        raise RequestError(f"generate: guidance of row {', '.join(first)}{more}: {guidance_remedy(distilled)}")


def _joint_scales(i: int, row: RequestRow, found: dict[str, float], labels: list[str]) -> dict[str, float]:
    """Return the scale of all labels together, as JOINT, and those of single labels beside it.

    Args:
        i: Number of the row.
        found: What `row_guidance` returns.
    """
    if JOINT in row.guidance and "" in row.guidance:
        raise RequestError(
            f"generate: row {i + 1} has {GUIDANCE} ({row.guidance['']:g}) and {GUIDANCE}.{JOINT} "
            f"({row.guidance[JOINT]:g}), and both are the scale of all labels together; give one of them"
        )
    if JOINT in found:
        return found
    given = {label: found[label] for label in labels if row.condition.get(label) is not None} or {"": 1.0}
    if len(set(given.values())) > 1:
        raise RequestError(
            f"generate: row {i + 1} guides its labels by {given}, and this model was trained with joint labels: "
            f"{NAME_JOINT}"
        )
    return {JOINT: next(iter(given.values()))}


def _library(row: RequestRow, settings: Settings, sizes: LibrarySizes) -> tuple[float, float]:
    """Return mean and standard deviation of the log library sizes of a row."""
    fixed = row.library_size if row.library_size is not None else settings.library_size
    if not isinstance(fixed, str):
        return float(np.log(fixed)), 0.0
    try:
        statistic = sizes.of(row.condition)
    except ValueError as error:
        raise RequestError(
            f"generate: {error}; give generate.library_size a number, or the table such a column"
        ) from error
    return statistic.mean, statistic.sd


# ---- obs ---------------------------------------------------------------------------------------------------------
def generated_obs(
    ids: np.ndarray, names: list[str], recipe: Recipe, request: Request, settings: Settings, vocabulary: Vocabulary
) -> pd.DataFrame:
    """Return obs of generated cells: labels in the type of the training data, is_synthetic, gen_index, guidance.

    Args:
        ids: Cell ids, (b,).
        names: Names of the cells, unique.
    """
    rows = recipe.rows(ids)
    asked = np.diff(recipe.stops, prepend=0) > 0
    obs = pd.DataFrame(index=pd.Index(names, dtype=str))
    for label in vocabulary.labels:
        classes = recipe.conditions[label.name]
        obs[label.name] = label.column(classes[rows], used=classes[asked])
    obs["is_synthetic"] = True
    obs["gen_index"] = ids
    for column, values in _guidance(request, settings, [x.name for x in vocabulary.labels]).items():
        obs[column] = values[rows].astype(np.float32)
    return obs


def _guidance(request: Request, settings: Settings, labels: list[str]) -> dict[str, np.ndarray]:
    """Return columns of the request's rows: one scale, and one for each label if any row's differ."""
    scales = [row_guidance(r, settings, labels) for r in request.rows]
    single = [w.get(JOINT, next(iter(w.values())) if len(set(w.values())) == 1 else np.nan) for w in scales]
    columns = {"guidance_scale": np.array(single if labels else [1.0] * len(scales))}
    if any(JOINT in w for w in scales):  # the scale of all labels together, and those of single labels beside it
        columns |= {f"guidance_scale.{x}": np.array([w[x] if JOINT in w else 0.0 for w in scales]) for x in labels}
    elif np.isnan(columns["guidance_scale"]).any():
        columns |= {f"guidance_scale.{x}": np.array([w[x] for w in scales]) for x in labels}
    return columns


def genes_table(vocabulary: Vocabulary, genes: np.ndarray | None = None) -> pd.DataFrame:
    """Return var of cells: feature ids as the index, `feature_name`; of all genes, or of the given ones."""
    kept = range(vocabulary.n_genes) if genes is None else genes
    ids, names = [vocabulary.feature_ids[i] for i in kept], [vocabulary.feature_names[i] for i in kept]
    return pd.DataFrame({"feature_name": names}, index=pd.Index(ids, name="feature_id"))
