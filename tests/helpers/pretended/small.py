"""Small networks with their objectives, and the step of a training on the device without Ray, DeepSpeed and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from helpers.pretended.device import CUDA
from pipeline.data.loading.blocks import LABEL
from pipeline.data.loading.feed import FeedStep
from pipeline.data.loading.order import FeedOrder
from pipeline.data.presence import GROUP
from pipeline.training.objectives.flow import FlowDraws, FlowObjective
from pipeline.training.objectives.vae import VaeObjective
from pipeline.training.prefetch import prefetch
from scldm.data.genes_seen import GenesSeenConfig
from scldm.flow.config import PathConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import ClassFeatures, DiT
from scldm.nn.vae import VAE
from scldm.optim.adamw import adamw
from scldm.optim.config import EMAConfig, OptimizerConfig
from scldm.optim.ema import EMA

GENES, CELLS, CLASSES = 40, 12, 3
SHAPE = (4, 4)  # latent tokens, latent width
NARROW = {"d_model": 16, "n_layers": 1, "n_latent_tokens": SHAPE[0], "latent_width": SHAPE[1]}
WIDE = {**NARROW, "d_model": 64, "n_heads": 2, "n_heads_cross": 2}  # wide heads: the decoder's plain tiles


def cells_table(
    n: int = CELLS, *, n_genes: int = GENES, expressed: float = 1.0, groups: bool = False, seed: int = 0
) -> pa.Table:
    """Counts as a feed reads them. Every cell expresses gene 0.

    Args:
        expressed: Mean count of a gene.
        groups: Whether cells are of two groups of data sets, which measured other genes.
    """
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.5, 2 * expressed, size=(n, n_genes)))
    x[:, 0] += 1
    columns = {
        "soma_joinid": np.arange(n),
        "gene": pa.array([np.flatnonzero(row).astype(np.int32) for row in x], pa.list_(pa.int32())),
        "count": pa.array([row[row > 0].astype(np.float32) for row in x], pa.list_(pa.float32())),
        LABEL + "cell_type": pa.array(rng.integers(0, CLASSES, n).astype(np.int32)),
        "library_size": x.sum(1).astype(np.float32),
        "weight": np.ones(n, np.float32),
    }
    return pa.table(columns | ({LABEL + GROUP: pa.array(np.arange(n, dtype=np.int32) % 2)} if groups else {}))


def latents_table(n: int = CELLS, *, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> pa.Table:
    """Latents as the latent cache holds them; of a trajectory, (n + 1, m, e)."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    return pa.table({
        "soma_joinid": np.arange(n),
        "latent": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=n * size).astype(np.float32)), size),
        LABEL + "cell_type": pa.array(rng.integers(0, CLASSES, n).astype(np.int32)),
        "log_library_size": np.ones(n, np.float32),
        "weight": np.ones(n, np.float32),
    })  # fmt: skip


def vae_objective(
    config: Mapping[str, Any], *, n_genes: int = GENES, groups: bool = False, seen: GenesSeenConfig | None = None,
    genes_per_step: int | None = None, max_genes: int | None = None,
) -> VaeObjective:  # fmt: skip
    torch.manual_seed(0)
    vae, mean = VAE(VAEConfig(**config), n_genes=n_genes), torch.rand(n_genes) + 0.1
    vae.start_at(mean)
    measured = torch.rand(2, n_genes) < 0.8 if groups else None
    if measured is not None:
        measured[:, 0] = True
    return VaeObjective(
        vae, labels=["cell_type"], mean_counts=mean, genes_per_step=genes_per_step, max_genes=max_genes, seed=0,
        validation=[cells_table(n_genes=n_genes, groups=groups)], measured=measured, genes_seen=seen,
    )  # fmt: skip


def flow_draws(n: int = CELLS, *, shape: tuple[int, int] = SHAPE) -> FlowDraws:
    """Random numbers of one worker with one lane, whose steps have n cells."""
    return FlowDraws(0, FeedOrder(np.arange(n), 4, 0, n, 1, n), [0], latent_shape=shape, n_labels=1)


def small_dit(
    features: Mapping[str, ClassFeatures] | None = None, *, from_controls: bool = False, **config: Any
) -> DiT:
    """A network whose gates are not zero, as they are at first: then every parameter has a gradient."""
    torch.manual_seed(0)
    settings = DiTConfig(**{"d_model": 32, "n_layers": 2, **config})
    dit = DiT(
        settings, n_latent_tokens=SHAPE[0], latent_width=SHAPE[1], n_classes={"cell_type": CLASSES}, features=features,
        from_controls=from_controls,
    )  # fmt: skip
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return dit


def flow_objective(dit: DiT, path: PathConfig | None = None, **more: Any) -> FlowObjective:
    settings = {"draws": flow_draws(), "validation": [latents_table()], **more}
    return FlowObjective(
        dit, path=path or PathConfig(), n_classes={"cell_type": CLASSES}, label_dropout=0.2, **settings
    )


class Trainer:
    """What the training loop does to a network in a step, on the device: loss, gradients, clipping, AdamW, EMA.

    Args:
        dtype: Precision of products, by autocast as in training; None: that of the weights.
    """

    def __init__(self, objective: Any, dtype: torch.dtype | None = None, *, cautious: bool = False):
        self.objective, self.dtype = objective, dtype
        objective.module.to(CUDA)
        self.parameters = [p for p in objective.module.parameters() if p.requires_grad]
        self.optimizer = adamw(objective.module, OptimizerConfig(cautious=cautious))
        self.ema, self.taken = EMA(objective.module, EMAConfig()), 0

    def prepared(self, table: pa.Table, *, steps: int = 1, micro_batches: int = 1) -> Any:
        """Yield steps of all cells of a table, as the prefetch thread leaves them on the device."""
        rows = len(table) // micro_batches
        parts = [table.slice(i * rows, rows) for i in range(micro_batches)]
        todo = iter([FeedStep(step, 0, parts, len(table)) for step in range(steps)])
        return prefetch(todo, self.objective.prepare, CUDA)

    def take(self, step: Any) -> Tensor:
        """Take a prepared step; return the loss of the last micro batch's cells, (b,)."""
        for index, batch in step.micro_batches():
            with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype is not None):
                loss = self.objective.loss(self.objective.module, batch, index)
            ((loss * batch.weight).sum() / step.real_cells).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1
        self.ema.update(self.taken)
        return loss.detach()


def train(
    build: Callable[[], Any], table: pa.Table, dtype: torch.dtype | None = None, *, cautious: bool = False
) -> Callable[[], None]:
    """Return a path: two steps of two micro batches, then a validation with the averaged weights.

    Args:
        build: Makes the objective, on the CPU.
        table: The cells of every step.
    """

    def path() -> None:
        objective = build()
        trainer = Trainer(objective, dtype, cautious=cautious)
        before = [p.detach().clone() for p in trainer.parameters]
        for step in trainer.prepared(table, steps=2, micro_batches=2):
            loss = trainer.take(step)
            assert loss.is_cuda, "the loss left the device"
            assert bool(loss.isfinite().all()), "the loss is not finite"
        moved = sum(bool((a != b).any()) for a, b in zip(before, trainer.parameters, strict=True))
        assert moved > len(before) / 2, f"only {moved} of {len(before)} parameters were trained"
        with trainer.ema.swapped(objective.module), torch.no_grad():
            totals, n = objective.validation(0, 1)
        assert n == len(table), "validation cells are missing"
        assert np.isfinite(list(totals.values())).all(), "a validation score is not finite"

    return path
