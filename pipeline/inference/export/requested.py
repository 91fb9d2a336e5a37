"""How many cells of each condition a generate stage was asked for, read again from its settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.config.job import GenerateConfig
from pipeline.core.manifest import read_manifest
from pipeline.data.ingest.dataset import Ingested
from pipeline.inference.request import read_request
from scldm.cells.shards import CellsManifest
from scldm.errors import InputError

Condition = tuple[tuple[str, str | None], ...]  # (label, class) for every label of the model


class CannotTell(Exception):
    """Why the request cannot be read again."""


def requested_cells(manifest: CellsManifest) -> dict[Condition, int]:
    """Cells asked for of each condition.

    Raises:
        CannotTell: the ingest that it was made from is not there any more, or its table has changed.
    """
    folder = Path(manifest.folder).resolve()
    version = manifest.raw.get("inputs", {}).get("ingest")
    ingest = read_manifest(folder.parent.parent / "ingest" / str(version)) if version else None
    if ingest is None:
        raise CannotTell(f"its ingest {version} is not beside it ({folder.parent.parent / 'ingest'})")
    data = Ingested.open(ingest)
    try:
        config = GenerateConfig.model_validate(manifest.raw["config"])
        compositions = {str(config.like): data.composition(config.like)} if config.like else {}
        request = read_request(config, data.vocabulary, compositions)
    except (InputError, ValueError, KeyError) as error:
        raise CannotTell(f"the request cannot be read again ({str(error).splitlines()[0]})") from error
    if request.digest != manifest.raw["facts"].get("request_digest"):
        raise CannotTell(f"the table {config.conditions or ''} is no longer the one that was asked for")
    wanted: Counter[Condition] = Counter()
    names = [x.name for x in data.vocabulary.labels]
    for row in request.rows:
        if row.n_cells:
            wanted[tuple((n, row.condition.get(n)) for n in names)] += row.n_cells
    return dict(wanted)
