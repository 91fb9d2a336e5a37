"""Read names of genes and of label classes from the files of a checkpoint: JSON, parquet, h5ad, plain text.

The order in the file is kept, because it is the order of the ids. No counts are read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pandas as pd

from scldm.data.class_names import class_text
from scldm.data.text_genes import read_text_genes
from scldm.data.text_table import TextTableError
from scldm.errors import CheckpointError

IDS, NAMES = "feature_id", "feature_name"


@dataclass(frozen=True)
class GeneList:
    """Genes in the order of their ids."""

    feature_ids: tuple[str, ...]
    feature_names: tuple[str, ...]

    @classmethod
    def from_ids(cls, ids: Iterable[Any], names: Iterable[Any] | None = None) -> GeneList:
        """Build a list from ids and, if there are any, names; names default to the ids."""
        ids = tuple(map(str, ids))
        return cls(ids, ids if names is None else tuple(map(str, names)))


def read_genes(path: Path, known: Collection[str] = ()) -> GeneList:
    """Read genes from a `.json`, `.parquet`, `.h5ad`, `.csv`, `.tsv` or `.txt` file.

    A JSON file has the key `genes`, or is a model's vocabulary.json; a parquet file has a column `feature_id`; of an
    h5ad, var is read.

    A text file has one gene per line, or a header line with a name as `feature_id`, `gene_id` or `symbol`.

    Args:
        known: Genes of the data; the first line of a text file is then no header if it is one of them.
    """

    def text_genes(path: Path) -> GeneList:
        found = read_text_genes(path, known)
        return GeneList.from_ids(found.ids, found.names)

    kinds = {".json": _json_genes, ".parquet": _parquet_genes, ".h5ad": _h5ad_genes}
    kinds |= {".csv": text_genes, ".tsv": text_genes, ".txt": text_genes}
    genes = _read(path, kinds)
    if not genes.feature_ids:
        raise CheckpointError(f"{path} holds no genes")
    repeated = [gene for gene, n in Counter(genes.feature_ids).items() if n > 1]
    if repeated:
        raise CheckpointError(
            f"{path} names {len(repeated)} genes more than once, the first is {repeated[0]}; ids must be unique"
        )
    return genes


def has_genes(path: Path) -> bool:
    """Return whether a metadata file names genes: an `.h5ad` does, a `.json` may."""
    return path.suffix.lower() != ".json" or "genes" in _read(path, {".json": _json})


def read_classes(path: Path, labels: Iterable[str]) -> dict[str, list[str]]:
    """Read the classes of each label, in the order of their ids.

    They are `labels` of a metadata JSON, or the categories of an `.h5ad`'s obs.
    """
    wanted = list(labels)
    found = _read(path, {".json": _json_classes, ".h5ad": lambda p: _h5ad_classes(p, wanted)})
    missing = [label for label in wanted if label not in found]
    if missing:
        raise CheckpointError(f"{path} has no classes of {', '.join(missing)}; it has: {', '.join(found) or 'none'}")
    return {label: found[label] for label in wanted}


def _read(path: Path, kinds: dict[str, Any]) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, or is not a file")
    if path.suffix.lower() not in kinds:
        raise CheckpointError(f"{path} has the ending {path.suffix!r}; known: {', '.join(kinds)}")
    try:
        return kinds[path.suffix.lower()](path)
    except CheckpointError:
        raise
    except TextTableError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]})") from None


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a dictionary; got {type(value).__name__}")
    return value


def _json_genes(path: Path) -> GeneList:
    value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, dict) and {"feature_ids", "feature_names"} <= value.keys():  # a model's own
        return GeneList.from_ids(value["feature_ids"], value["feature_names"])
    genes = value.get("genes") if isinstance(value, dict) else value
    if not isinstance(genes, list):
        raise CheckpointError(f"{path} must hold a list, or a dictionary with a list `genes`")
    return GeneList.from_ids(genes)


def _json_classes(path: Path) -> dict[str, list[str]]:
    labels = _json(path).get("labels") or {}
    wrong = [k for k, v in labels.items() if not isinstance(v, list)]
    if wrong:
        raise CheckpointError(f"{path}: labels.{wrong[0]} must be a list of classes")
    return {k: [class_text(x) for x in v] for k, v in labels.items()}


def _parquet_genes(path: Path) -> GeneList:
    table = pd.read_parquet(path)
    if IDS not in table:
        raise CheckpointError(f"{path} has no column {IDS}; it has {', '.join(map(str, table.columns))}")
    return GeneList.from_ids(table[IDS], table.get(NAMES))


def _h5ad_genes(path: Path) -> GeneList:
    with h5py.File(path) as f:
        var = f["var"]
        ids = _column(var, var.attrs.get("_index", "_index"))
        return GeneList.from_ids(ids, _column(var, NAMES) if NAMES in var else None)


def _h5ad_classes(path: Path, labels: list[str]) -> dict[str, list[str]]:
    with h5py.File(path) as f:
        obs = f["obs"]
        found = {k: obs[k] for k in labels if k in obs and "categories" in obs[k]}
        return {k: [class_text(x) for x in _values(node["categories"])] for k, node in found.items()}


def _column(frame: h5py.Group, name: str) -> list[str]:
    node = frame[name]
    if isinstance(node, h5py.Group) and "categories" in node:
        categories = _strings(node["categories"])
        return [categories[i] for i in node["codes"][:]]
    return _strings(node)


def _strings(node: h5py.Dataset) -> list[str]:
    return [str(x) for x in _values(node)]


def _values(node: h5py.Dataset) -> list[Any]:
    return [x.decode() if isinstance(x, bytes) else x for x in node[:]]
