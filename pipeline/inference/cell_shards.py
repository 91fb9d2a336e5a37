"""Names of the shards of cells that batch jobs write."""

CELLS = "cells/"  # below the stage's folder; records name files from there


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"part-{shard:05d}.h5ad"
