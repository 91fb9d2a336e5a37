"""Asks an old model for old cells: ingest.replay.model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.apply import ModelNames
from pipeline.config.job import GenerateConfig
from pipeline.inference.models import check_folders, draws_counts, named_models
from scldm.data.library_size import LibrarySizes, condition_key
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

MOST_PER_SHARD = 25_000


def old_model_problems(name: str) -> list[str]:
    """Return why a model cannot generate old cells, from its small files."""
    try:
        named = named_models(ModelNames(vae=name, flow=name))
        check_folders(named)
        if not draws_counts(named.vae):
            return [
                f"ingest.replay.model: {name} has a gaussian head and generates log-normalised values, and old cells "
                "are counts; name real cells in ingest.replay.pipeline or ingest.replay.source"
            ]
    except InputError as error:
        return [f"ingest.replay.model: {error}"]
    return []


def request_old_cells(name: str, n_cells: int, *, seed: int) -> GenerateConfig:
    """Return a request for cells at the composition of the cells that a model was trained on.

    The composition is that of its library sizes: each combination of classes with its number of cells, or all classes
    alike if it does not state them, as a converted model.
    """
    models = ModelNames(vae=name, flow=name)
    flow = Path(str(named_models(models).flow))
    vocabulary = Vocabulary.load(flow / "vocabulary.json")
    sizes = LibrarySizes.load(flow / "library_size.json")
    found = _combinations(vocabulary, sizes)
    rows = [
        {**c, "n_cells": n} for c, n in zip([c for c, _ in found], _shared(n_cells, [w for _, w in found]), strict=True)
    ]
    return GenerateConfig(model=models, cells=[r for r in rows if r["n_cells"]], seed=seed, shard_size=MOST_PER_SHARD)


def _combinations(vocabulary: Vocabulary, sizes: LibrarySizes) -> list[tuple[dict[str, Any], int]]:
    """Return the combinations of classes of all labels that the model has seen, each with its number of cells."""
    labels = sorted(vocabulary.labels, key=lambda x: x.name)
    if not labels:
        return [({}, 1)]
    one = {x.name: "|".join(re.escape(c) for c in sorted(x.classes, key=len, reverse=True)) for x in labels}
    pattern = re.compile("".join(f"{'[|]' if i else ''}{re.escape(n)}=({c})" for i, (n, c) in enumerate(one.items())))
    found = [
        (dict(zip(one, match.groups(), strict=True)), 1 if stat.n_cells is None else stat.n_cells)
        for key, stat in sizes.table.items()
        if (match := pattern.fullmatch(key)) is not None
    ]
    if found:
        return found
    # Statistics of single labels, or none at all: the label whose cells are counted best; the others stay open.
    counted = {x.name: [_n_cells(sizes, x.name, c) for c in x.classes] for x in labels}
    best = max(labels, key=lambda x: sum(counted[x.name]))
    if not sum(counted[best.name]):
        return [({best.name: c}, 1) for c in best.classes]
    return [({best.name: c}, n) for c, n in zip(best.classes, counted[best.name], strict=True) if n]


def _n_cells(sizes: LibrarySizes, label: str, name: str) -> int:
    """Return the number of training cells of a class; 0 if it is not known."""
    found = sizes.table.get(condition_key({label: name}))
    return 0 if found is None or found.n_cells is None else found.n_cells


def _shared(n: int, weights: Sequence[int]) -> list[int]:
    """Divide n by weights, by largest remainders."""
    total = sum(weights)
    parts = [n * w // total for w in weights]
    rest = sorted(range(len(weights)), key=lambda i: (-(n * weights[i] % total), i))
    for i in rest[: n - sum(parts)]:
        parts[i] += 1
    return parts
