"""The steps whose launches, syncs and copies have budgets: of training a VAE and a flow, of encoding and generating.

A step is taken twice and the second one is recorded: the first one allocates what later ones use again. What the feed
prepares in its thread is not of the step but of its preparation, which overlaps with the step before.

Rows are named as in benchmarks/gpu_budgets.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.pretended.device import CUDA, PretendedDevice, Record
from helpers.pretended.patches import pretended
from helpers.pretended.small import (
    CLASSES,
    Trainer,
    cells_table,
    flow_draws,
    latents_table,
    vae_objective,
)
from pipeline.data.loading.collate import to_cell_batch
from pipeline.training.objectives.flow import FlowObjective
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.library_size import LibrarySizes, LogNormal
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.guidance import JOINT
from scldm.generation.cell_maker import CellMaker, Recipe
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT

BUDGETS = Path(__file__).with_name("budgets.json")
VAE = {"d_model": 64, "n_layers": 8, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 8, "latent_width": 8}
BATCH = 16
Step = Callable[[PretendedDevice], Record]


def steps() -> dict[str, Step]:
    """Return the steps by the name of their row. One is a function of the device that returns what it recorded."""
    bf16 = torch.bfloat16
    return {
        "vae_step@1024_genes": lambda device: vae_step(device, 1024),
        "vae_step@1536_genes": lambda device: vae_step(device, 1536),
        "vae_step@1536_genes_bf16": lambda device: vae_step(device, 1536, dtype=bf16),
        "vae_step@700_of_1536_genes": lambda device: vae_step(device, 1536, genes_per_step=700),
        "vae_step@1536_genes_measured": lambda device: vae_step(device, 1536, groups=True),
        "vae_step@1024_genes_narrow_heads": lambda device: vae_step(device, 1024, n_heads_cross=4, d_model=32),
        "vae_step@1024_genes_4_micro_batches": lambda device: vae_step(device, 1024, micro_batches=4),
        **{f"flow_step@{n}_layers": lambda device, n=n: flow_step(device, n) for n in (1, 2, 8)},
        "flow_step@8_layers_bf16": lambda device: flow_step(device, 8, dtype=bf16),
        "encode@1024_genes": lambda device: encode(device, 1024),
        "generate@8_layers": lambda device: generate(device, 8),
        "generate@8_layers_guided": lambda device: generate(device, 8, guidance=2.0),
        "prepare_vae": prepare_vae,
        "prepare_flow": prepare_flow,
        "step_losses": step_losses,
    }


def record(step: Step) -> Record:
    """Record a step on a new device."""
    with pretended() as device:
        return step(device)


def second(device: PretendedDevice, call: Callable[[], object]) -> Record:
    """Call twice and record the second call."""
    call()
    device.record.clear()
    call()
    return Record(*(type(found)(found) for found in vars(device.record).values()))


def vae_step(
    device: PretendedDevice, n_genes: int, *, genes_per_step: int | None = None, groups: bool = False,
    dtype: torch.dtype | None = None, micro_batches: int = 1, **config: Any,
) -> Record:  # fmt: skip
    objective = vae_objective({**VAE, **config}, n_genes=n_genes, genes_per_step=genes_per_step, groups=groups)
    table = cells_table(BATCH, n_genes=n_genes, expressed=0.2, groups=groups)
    return _taken(device, Trainer(objective, dtype), table, micro_batches)


def flow_step(device: PretendedDevice, n_layers: int, *, dtype: torch.dtype | None = None) -> Record:
    return _taken(device, Trainer(flow(n_layers), dtype), latents_table(BATCH, shape=(16, 16)), 1)


def _taken(device: PretendedDevice, trainer: Trainer, table: Any, micro_batches: int) -> Record:
    todo = list(trainer.prepared(table, steps=2, micro_batches=micro_batches))
    trainer.take(todo[0])
    device.record.clear()
    trainer.take(todo[1])
    return Record(*(type(found)(found) for found in vars(device.record).values()))


def flow(n_layers: int, width: int = 64) -> FlowObjective:
    torch.manual_seed(0)
    dit = DiT(
        DiTConfig(d_model=width, n_layers=n_layers), n_latent_tokens=16, latent_width=16,
        n_classes={"cell_type": CLASSES},
    )  # fmt: skip
    return FlowObjective(
        dit, path=PathConfig(), n_classes=dit.n_classes, draws=flow_draws(BATCH, shape=(16, 16)), label_dropout=0.1,
        validation=[],
    )  # fmt: skip


def encode(device: PretendedDevice, n_genes: int) -> Record:
    """A tile of cells on the host becomes latents on the host, as in the encode stage."""
    vae = vae_objective(VAE, n_genes=n_genes).module.to(CUDA)
    table = cells_table(BATCH, n_genes=n_genes, expressed=0.2)

    def call() -> None:
        with torch.no_grad():
            vae.encode(to_cell_batch(table, ["cell_type"]).to(CUDA)).flatten(1).float().cpu().numpy()

    return second(device, call)


def generate(device: PretendedDevice, n_layers: int, *, n_genes: int = 1024, guidance: float = 1.0) -> Record:
    """A tile of generated cells: latents by the default solver, decoded, on the host."""
    names = Vocabulary(*(tuple(f"{x}{i}" for i in range(n_genes)) for x in "gG"), (_cell_type(),))
    sizes = LibrarySizes({"all": LogNormal(6.0, 0.1, 10)})
    vae = LoadedVAE(vae_objective({**VAE, "n_latent_tokens": 16, "latent_width": 16}, n_genes=n_genes).module.to(CUDA),
                    names, sizes)  # fmt: skip
    dit = flow(n_layers).module.to(CUDA).eval()
    pair = LoadedFlow(dit, PathConfig(), names, sizes, 16, 16)
    n = 64
    scale = {} if guidance == 1 else {JOINT: np.array([guidance])}
    labels = {"cell_type": np.zeros(1, np.int64)}
    recipe = Recipe(np.array([n]), labels, scale, np.array([6.0]), np.array([0.1]))
    maker = CellMaker(vae, pair, recipe, sampler=SamplerConfig(), seed=0)
    maker.tile = n  # the launches of a tile do not depend on its size, and this one is computed by a CPU
    return second(device, lambda: list(maker.decoded(0, n)))


def _cell_type() -> LabelVocabulary:
    return LabelVocabulary("cell_type", tuple(f"class {i}" for i in range(CLASSES)))


def prepare_vae(device: PretendedDevice) -> Record:
    """What the prefetch thread copies for a step of a VAE."""
    trainer = Trainer(vae_objective(VAE, n_genes=1024))
    table = cells_table(BATCH, n_genes=1024, expressed=0.2)
    return second(device, lambda: list(trainer.prepared(table)))


def prepare_flow(device: PretendedDevice) -> Record:
    """What the prefetch thread copies for a step of a flow."""
    trainer, table = Trainer(flow(1)), latents_table(BATCH, shape=(16, 16))
    return second(device, lambda: list(trainer.prepared(table)))


def step_losses(device: PretendedDevice) -> Record:
    """What the loop asks about the losses of a step before it updates: are they finite, and what is their mean?"""
    from unittest import mock

    import torch.distributed as dist

    from pipeline.training.state import StepLosses

    loss, weight, ids = (torch.ones(BATCH, device=CUDA) for _ in range(3))

    def call() -> None:
        losses = StepLosses(CUDA, BATCH)
        losses.add(loss, weight, ids)
        losses.reduce()

    with mock.patch.object(dist, "all_reduce", return_value=None):
        return second(device, call)


def read_budgets() -> dict[str, dict[str, int]]:
    """Return the budgets by step: the most launches, syncs and copies."""
    return json.loads(BUDGETS.read_text())


def write_budgets(found: dict[str, dict[str, int]]) -> None:
    """Write what was measured as the budgets."""
    lines = [f" {json.dumps(name)}: {json.dumps(values)}" for name, values in found.items()]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
