"""Writes the golden files of a version: what it left on disk, and the numbers that come of it. Once per release:

    PYTHONPATH=.:tests python tests/golden/make.py 0.2.0

    vae/, flow/          a pair with random weights: shared dispersions, two labels
    models/              a VAE of each further kind: dispersions per cell, a Gaussian head, merged adapters, one that
                         was started from the pair with other genes, labels and head
    run/                 a checkpoint of a training run
    job.yaml             a job, resolved
    pipeline/            `pipeline.yaml` of this folder and the output of running it: a store, a VAE, latents, a flow,
                         shards of generated cells, an evaluation
    expected.json        what the models compute

Of 0.1.0, `models/` is missing (it knew no such models), and so is `pipeline/`. After a release nothing in a folder is
written again: it is what that version wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from helpers.models.small_models import CELL_TYPES, DONORS, library_sizes, random_weights, write_flow, write_vae

import scldm
from pipeline.config.io.loader import load_job, resolved_yaml
from pipeline.training.checkpoints import manifest as checkpoint
from pipeline.training.engine.state_files import shard_name, write_tensors
from scldm.checkpoints.native import LoadedVAE, load_flow, load_vae, save_vae
from scldm.checkpoints.start_from import Started, adapt, start_vae
from scldm.data.batch import CellBatch
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.nn.vae import VAE
from scldm.optim.config import LoraConfig
from scldm.optim.lora import merged

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COUNTS = [[3, 0, 1, 0, 7, 2], [0, 5, 0, 1, 0, 40], [1, 1, 1, 1, 1, 1]]
# Of a pipeline's output: pictures, pages, what was meant for MLflow and what Ray keeps are read by nobody later.
LEFT_OUT = ("figures", "report.html", "*.csv", "tracking*", ".mlflow*", "progress.json", "ray", "*.lock", ".lock")


# ---- numbers -----------------------------------------------------------------------------------------------------
def numbers(folder: Path) -> dict[str, Any]:
    """What the models of a folder compute for three cells: the oracle, and what it is compared with."""
    vae, flow = load_vae(folder / "vae"), load_flow(folder / "flow")
    raw = load_flow(folder / "flow", weights="raw")
    conditions = {"cell_type": torch.tensor([0, 2, 3]), "donor": torch.tensor([1, 0, 2])}
    found = vae_numbers(vae)
    z = torch.tensor(found["latents"])
    with torch.no_grad():
        for name, loaded in (("velocity", flow), ("velocity_raw", raw)):
            found[name] = loaded.dit(z, torch.tensor([0.1, 0.5, 0.9]), conditions).tolist()
    sizes = {c: vae.library_sizes.of({"cell_type": c}).mean for c in ("T", "B", "NK")}
    found |= {"genes": list(vae.vocabulary.feature_ids), "digest": vae.vocabulary.digest, "sizes": sizes}
    more = sorted(p for p in (folder / "models").glob("*") if p.is_dir())
    return found | ({"models": {p.name: vae_numbers(load_vae(p)) for p in more}} if more else {})


def vae_numbers(loaded: LoadedVAE) -> dict[str, Any]:
    """Latents, means and losses of the three cells; of a model with fewer genes, of those."""
    counts = torch.tensor(COUNTS, dtype=torch.float32)[:, : loaded.vae.n_genes]
    cells = CellBatch.from_dense(counts)
    with torch.no_grad():
        z = loaded.vae.encode(cells)
        found = {"latents": z, "mu": loaded.vae.decode_mu(z, cells.library_size), "nll": loaded.vae(cells)}
    return {name: value.tolist() for name, value in found.items()}


def generated(folder: str | Path) -> dict[str, Any]:
    """Cells that a pipeline's newest models make for one class: where they are not zero, and the values there."""
    made = scldm.load(folder).generate({"cell_type": "classical monocyte"}, n=3, seed=5)
    x = made.X.tocoo()
    return {"row": x.row.tolist(), "column": x.col.tolist(), "counts": np.asarray(x.data).tolist()}


# ---- models ------------------------------------------------------------------------------------------------------
def write_models(folder: Path, pair: Path) -> None:
    """VAEs of the kinds that the pair is not."""
    write_vae(folder / "nb_cell", CELL_TYPES, DONORS, head="nb_cell")
    write_vae(folder / "gaussian", CELL_TYPES, DONORS, head="gaussian")
    old = load_vae(pair / "vae")
    write_merged(folder / "lora", old)
    write_started(folder / "started", old)


def write_merged(folder: Path, old: LoadedVAE) -> None:
    """The pair's VAE with trained adapters, merged as training leaves it."""
    lora, vae = LoraConfig(rank=2), VAE(old.vae.config, n_genes=old.vae.n_genes)
    adapt(vae, lora, start_vae(vae, old.vocabulary, old), seed=0)
    state = vae.state_dict()
    for name in (n for n in state if n.endswith(".0.b")):
        state[name] = 0.1 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(len(name)))
    whole = VAE(old.vae.config, n_genes=old.vae.n_genes)
    whole.load_state_dict(merged(state, lora))
    save_vae(folder, whole, old.vocabulary, old.library_sizes, card="the pair's VAE with merged adapters")


def write_started(folder: Path, old: LoadedVAE) -> None:
    """A VAE that took the weights of the pair's: genes g1 to g5 and a new one, another label, another head."""
    genes = (*old.vocabulary.feature_ids[1:], "g9")
    label = LabelVocabulary("tissue", ("gut", "lung"))
    vocabulary = Vocabulary(genes, tuple(g.upper() for g in genes), (label,))
    vae = random_weights(VAE(old.vae.config.model_copy(update={"head": "nb_cell"}), n_genes=len(genes)), seed=4)
    started: Started = start_vae(vae, vocabulary, old)
    assert started.genes == {"kept": 5, "new": 1, "dropped": 1}
    save_vae(folder, vae, vocabulary, library_sizes(label), card="started from the pair's VAE")


# ---- training ----------------------------------------------------------------------------------------------------
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


# ---- pipeline ----------------------------------------------------------------------------------------------------
def write_pipeline(folder: Path) -> None:
    """Run `pipeline.yaml`, and keep what later versions must open."""
    folder.mkdir(parents=True)
    shutil.copyfile(HERE / "pipeline.yaml", folder / "pipeline.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pipeline", "run", str(folder / "pipeline.yaml"), f"output={scratch}/runs"]
        where = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db"}
        subprocess.run(command, cwd=ROOT, env=where, check=True)
        left_out = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(f"{scratch}/runs/tiny", folder / "runs" / "tiny", ignore=left_out)
        without_places(folder / "runs", {f"{folder}/": "", scratch: "/outputs"})
    (folder / "expected.json").write_text(json.dumps(generated(folder / "runs" / "tiny")))


def without_places(folder: Path, places: dict[str, str]) -> None:
    """Replace the paths of this machine in the texts of a run; a checkpoint's manifest is under its own checksum."""
    for file in (p for p in folder.rglob("*") if p.suffix in (".json", ".yaml") and p.name != "MANIFEST.json"):
        text = file.read_text()
        for place, name in places.items():
            text = text.replace(place, name)
        file.write_text(text)


def main(version: str) -> None:
    folder = HERE / version
    folder.mkdir()  # refuses to write over what is there
    write_vae(folder / "vae", CELL_TYPES, DONORS)
    write_flow(folder / "flow", CELL_TYPES, DONORS)
    write_models(folder / "models", folder)
    write_run(folder / "run")
    (folder / "job.yaml").write_text(resolved_yaml(load_job(ROOT / "jobs" / "demo.yaml")))
    (folder / "expected.json").write_text(json.dumps(numbers(folder)))
    write_pipeline(folder / "pipeline")


if __name__ == "__main__":
    main(sys.argv[1])
