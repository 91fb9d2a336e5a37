"""The number of cells that a generate stage was asked for, by condition."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.config.job import GenerateConfig
from pipeline.core.manifest import read_manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.inference.request import recorded_request, resolve_request
from scldm.cells.shards import CellsManifest
from scldm.errors import InputError

Condition = tuple[tuple[str, str | None], ...]  # (label, class) for every label of the model


class RequestUnknown(Exception):
    """The request cannot be read again; the message is the reason."""


def requested_cells(manifest: CellsManifest) -> dict[Condition, int]:
    """Return the requested number of cells of each condition.

    Raises:
        RequestUnknown: the ingest that it was made from does not exist any more, or its table has changed.
    """
    folder = Path(manifest.folder).resolve()
    version = manifest.raw.get("inputs", {}).get("ingest")
    ingest = read_manifest(folder.parent.parent / "ingest" / str(version)) if version else None
    if ingest is None:
        raise RequestUnknown(
            f"its ingest {version} is not in the same output folder ({folder.parent.parent / 'ingest'})"
        )
    data = IngestedDataset.open(ingest)
    try:
        config = GenerateConfig.model_validate(manifest.raw["config"])
        request = recorded_request(folder) or resolve_request(config, data)
    except (InputError, ValueError, KeyError) as error:
        raise RequestUnknown(f"the request cannot be read again ({str(error).splitlines()[0]})") from error
    if request.digest != manifest.raw["facts"].get("request_digest"):
        raise RequestUnknown(f"the table {config.conditions or ''} is no longer the one of the request")
    wanted: Counter[Condition] = Counter()
    names = [x.name for x in data.vocabulary.labels]
    for row in request.rows:
        if row.n_cells:
            wanted[tuple((n, row.condition.get(n)) for n in names)] += row.n_cells
    return dict(wanted)
