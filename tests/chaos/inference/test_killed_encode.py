"""Actors that encode are killed at every point of a shard's commit: the latents come out as if they had not been."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers.training.small_job import MODEL, ingest_small

from pipeline.config.context import StageContext
from pipeline.config.job import EncodeConfig, ResourcesConfig
from pipeline.core.fault_points import POINTS
from pipeline.core.faults import VARIABLE
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.stages import encode
from scldm.checkpoints.native import save_vae
from scldm.nn.config import VAEConfig
from scldm.nn.vae import VAE

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
KILLS = [
    f"encode.{where}:n=2:kill" for where in ("before_rename", "before_record", "after_record")
]  # each actor's second
CELLS, ROWS, ACTORS = 9000, 2048, 2  # five storage tiles; a shard is one


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Manifest]:
    root = tmp_path_factory.mktemp("encode")
    ingested = ingest_small(root / "ingest", CELLS)
    data = IngestedDataset.open(ingested)
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**MODEL), n_genes=data.vocabulary.n_genes)
    save_vae(root / "model", vae, data.vocabulary, data.library_sizes, card="")
    facts = {"model": "model", "latent_shape": [MODEL["n_latent_tokens"], MODEL["latent_width"]]}
    return {"ingest": ingested, "train_vae": Manifest("train_vae", "v", str(root), {}, {}, facts, 0.0, 0.0)}


def run(folder: Path, inputs: dict[str, Manifest]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    tracker = SimpleNamespace(metrics=lambda values, step: None)
    context = StageContext(folder, inputs, 0, ResourcesConfig(cpus_per_worker=1, actors=ACTORS), tracker)
    return encode.run(EncodeConfig(splits=["train"]), context)


@contextmanager
def watched_actors() -> Iterator[set[int]]:
    """Process ids of all actors that encode meanwhile: more than asked for, where some died and came back."""
    seen: set[int] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "Encoder" in " ".join(process.cmdline()):
                        seen.add(process.pid)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join(5)


def test_every_point_of_encode_is_among_the_kills():
    assert {k.split(":")[0] for k in KILLS} == {p for p in POINTS if p.startswith("encode.")}


@pytest.mark.row("C1")
def test_actors_killed_at_any_point_of_a_shard_change_no_latent(tmp_path, inputs, ray_cluster, monkeypatch, record):
    monkeypatch.setattr(encode, "BLOCK_ROWS", ROWS)
    monkeypatch.setenv(VARIABLE, "")
    whole = run(tmp_path / "whole", inputs)
    assert len(whole["shards"]["train"]) >= 3
    kills = 0
    for i, fault in enumerate(KILLS):
        folder = tmp_path / f"kill{i}"
        monkeypatch.setenv(VARIABLE, fault)
        with watched_actors() as actors:
            assert run(folder, inputs)["shards"] == whole["shards"], fault
        assert len(actors) > ACTORS, f"{fault}: nobody was killed"
        monkeypatch.setenv(VARIABLE, "")
        (
            folder / "latents" / f"{whole['shards']['train'][1]['file']}.json"
        ).unlink()  # and a record of an attempt before
        assert run(folder, inputs)["shards"] == whole["shards"]
        left = [p.name for p in (folder / "latents").iterdir() if p.name.startswith(".")]
        assert not left, f"{fault} leaves {left}"
        kills += len(actors) - ACTORS
    record["kills"] = kills
