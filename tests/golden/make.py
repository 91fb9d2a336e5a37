"""Writes the golden files of a version: what it left on disk, and the numbers that come of it. Once per release:

    PYTHONPATH=.:tests python tests/golden/make.py 0.1.0

A folder that exists is never written again: it is what that version wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.models.small_models import CELL_TYPES, DONORS, write_flow, write_vae

from pipeline.config.io.loader import load_job, resolved_yaml
from pipeline.training.checkpoints import manifest as checkpoint
from pipeline.training.engine.state_files import shard_name, write_tensors
from scldm.checkpoints.native import load_flow, load_vae
from scldm.data.batch import CellBatch

HERE = Path(__file__).resolve().parent
COUNTS = [[3, 0, 1, 0, 7, 2], [0, 5, 0, 1, 0, 40], [1, 1, 1, 1, 1, 1]]


def numbers(folder: Path) -> dict[str, Any]:
    """What the models of a folder compute for three cells: the oracle, and what it is compared with."""
    vae, flow = load_vae(folder / "vae"), load_flow(folder / "flow")
    raw = load_flow(folder / "flow", weights="raw")
    cells = CellBatch.from_dense(torch.tensor(COUNTS, dtype=torch.float32))
    conditions = {"cell_type": torch.tensor([0, 2, 3]), "donor": torch.tensor([1, 0, 2])}
    with torch.no_grad():
        z = vae.vae.encode(cells)
        found = {
            "latents": z,
            "mu": vae.vae.decode_mu(z, cells.library_size),
            "nll": vae.vae(cells),
            "velocity": flow.dit(z, torch.tensor([0.1, 0.5, 0.9]), conditions),
            "velocity_raw": raw.dit(z, torch.tensor([0.1, 0.5, 0.9]), conditions),
        }
    sizes = {c: vae.library_sizes.of({"cell_type": c}).mean for c in ("T", "B", "NK")}
    names = {"genes": list(vae.vocabulary.feature_ids), "digest": vae.vocabulary.digest, "sizes": sizes}
    return {**names, **{name: value.tolist() for name, value in found.items()}}


def state() -> dict[str, torch.Tensor]:
    """Of a training run: weights and what the optimizer keeps, by parameter."""
    draw = torch.Generator().manual_seed(7)
    fields = [("weight", "encoder.queries", 24), ("exp_avg", "encoder.queries", 24), ("weight", "head.bias", 6)]
    return {f"{field}/0/{name}": torch.randn(n, generator=draw) for field, name, n in fields}


def write_run(root: Path) -> None:
    """A committed checkpoint, written as a worker that is alone writes it."""
    dist.init_process_group("gloo", init_method=f"file://{root.parent}/.store", rank=0, world_size=1)
    position = checkpoint.TrainingPosition(step=40, epoch=1, offset=8, world_size=1, config_hash="golden", zero_stage=1)
    write = lambda folder: {shard_name(0, 1): write_tensors(folder / shard_name(0, 1), state())}  # noqa: E731
    done = checkpoint.save(root, position, write, metrics={"val/loss": 1.25}, more={"tracker": "run"})
    assert isinstance(done, Path), done
    dist.destroy_process_group()
    (root.parent / ".store").unlink(missing_ok=True)


def main(version: str) -> None:
    folder = HERE / version
    folder.mkdir()  # refuses to write over what is there
    write_vae(folder / "vae", CELL_TYPES, DONORS)
    write_flow(folder / "flow", CELL_TYPES, DONORS)
    write_run(folder / "run")
    (folder / "job.yaml").write_text(resolved_yaml(load_job(HERE.parents[1] / "jobs" / "demo.yaml")))
    (folder / "expected.json").write_text(json.dumps(numbers(folder)))


if __name__ == "__main__":
    main(sys.argv[1])
