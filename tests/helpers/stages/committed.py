"""Checkpoints on disk, made without a training run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pipeline.core.files import file_digest
from pipeline.training.checkpoints.manifest import SCHEMA, TrainingPosition

POSITION = TrainingPosition(step=4, epoch=0, offset=4, world_size=2, config_hash="a", zero_stage=1)


def commit(root: Path, step: int, content: bytes = b"weights", loss: float | None = None) -> Path:
    """A checkpoint of one small file, which verifies."""
    folder = root / f"step-{step:08d}-w2-00000000"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(content)
    manifest = {
        "schema": SCHEMA,
        "position": asdict(POSITION) | {"step": step},
        "metrics": {} if loss is None else {"val/loss": loss},
        "more": {},
        "files": {"state.pt": (len(content), file_digest(folder / "state.pt"))},
    }
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    return folder


def steps(root: Path) -> list[int]:
    """Steps of the checkpoint folders, committed or not."""
    return [int(p.name.split("-")[1]) for p in sorted(root.glob("step-*"))]
