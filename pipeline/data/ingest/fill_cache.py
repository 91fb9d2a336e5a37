"""The last step of ingest, if the job asks for it: all cells into a cache, and the fact that says where it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.job import IngestConfig
from pipeline.core.manifest import StageContext
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.cache_writer import CacheInput, write_cache


def cache_facts(config: IngestConfig, context: StageContext, facts: dict[str, Any], *, content: str) -> dict[str, Any]:
    """Make the cache whole. Returns {} without one, else {"cache": {folder, bytes, shards, kept}}.

    Args:
        facts: Of this ingest, whose files are written.
        content: Hash of the counts, as far as its statistics have seen them.
    """
    if not config.cache:
        return {}
    root = _root(config.cache, context)
    data = IngestedDataset(context.folder, facts)
    # Cells written by this stage are known by their counts alone: the next job that writes the same shares them.
    where = None if facts["soma_uri"] == "soma" else data.soma_uri
    cells = CacheInput(
        data.all_blocks(),
        data.cells["library_size"].to_numpy(np.float32),
        {"uri": where, "content": content},
        facts["mean_expressed_genes"],
    )
    progress = ProgressWriter(context.folder)
    with ProgressReader(context.folder, "ingest cache"):
        done = write_cache(cells, root, on_shard=progress.update)
    # Relative where it is under the same root, so that the output folder can be moved as a whole.
    folder = os.path.relpath(done.folder, context.folder.absolute()) if config.cache is True else str(done.folder)
    return {
        "cache": {"folder": folder, "bytes": done.n_bytes, "shards": done.n_written + done.n_kept, "kept": done.n_kept}
    }


def _root(cache: str | bool, context: StageContext) -> Path:
    if isinstance(cache, str):
        return Path(cache).expanduser().absolute()
    if context.output is None:
        raise ValueError("ingest.cache: true stands for <output>/cache, and this context has no output folder")
    return context.output.absolute() / "cache"
