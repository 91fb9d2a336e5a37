"""Lets an output folder be copied or moved: MLflow keeps the place of artifacts as an absolute address in its database.

Without this, a copied folder would go on writing into the artifacts of the original, and a moved one would find none.
MLflow itself has no command for it.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

ADDRESSES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
FOLDER = "mlartifacts"


def follow_move(database: Path) -> str | None:
    """Point a database at the artifacts beside it, if it was written in another folder.

    Only addresses inside the former `mlartifacts` folder of an experiment change.

    Args:
        database: `mlflow.db` of an output folder, which nothing else writes at this time.

    Returns:
        The former address of the artifacts; None if the database was not moved, or does not exist.
    """
    if not database.is_file():
        return None
    here = (database.absolute().parent / FOLDER).as_uri()
    with closing(sqlite3.connect(database)) as connection, connection:
        columns = _columns(connection)
        if ("experiments", "artifact_location") not in columns:
            return None  # another schema, or a database that is just being made
        found = [str(row[0]) for row in connection.execute("SELECT artifact_location FROM experiments") if row[0]]
        former = sorted({x for x in found if x.endswith(f"/{FOLDER}") and x != here})
        for place in former:
            for table, column in sorted(columns):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR {column} LIKE ?",
                    (here, len(place) + 1, place, f"{place}/%"),
                )
    return former[0] if former else None


def _columns(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return the columns of addresses that this version of MLflow has."""
    found = set()
    for table, names in ADDRESSES.items():
        there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        found |= {(table, name) for name in names if name in there}
    return found
