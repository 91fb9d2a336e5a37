"""A training step of the presets: eager and compiled, by precision and batch; cells/s, MFU, peak memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from gpu_parts.clock import Timed, free, mfu_of, timed
from gpu_parts.plan import Budget, Measured, Outcome, described
from gpu_parts.sizes import PRECISIONS, Sizes, make_cells, products
from pipeline.training.engine.compiled_blocks import compile_blocks
from pipeline.training.objectives.flow import Draws, flow_losses
from scldm.flow.config import PathConfig
from scldm.nn.config import VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.flops import TRAINING, dit_flops, vae_flops
from scldm.nn.likelihood import gene_probabilities, sample_genes
from scldm.nn.vae import VAE
from scldm.optim.adamw import adamw
from scldm.optim.config import OptimizerConfig
from scldm.random import generator

CLASSES = 50


@dataclass(frozen=True)
class Form:
    """One way to compute a step."""

    precision: str
    batch: int
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.precision}.{'compiled' if self.compiled else 'eager'}.{self.batch}"


def forms(sizes: Sizes) -> Iterator[Form]:
    """Yield the forms, what tells most first: whether bf16 and compilation are worth it at the larger batch."""
    large, *smaller = sizes.batches
    first = [Form("bf16", large, False), Form("bf16", large, True)]
    rest = [Form(p, b, c) for c in (False, True) for b in (large, *smaller) for p in PRECISIONS]
    yield from dict.fromkeys([*first, *rest])


def vae_steps(sizes: Sizes) -> Callable[[Outcome, Budget], None]:
    """Return a part that measures each VAE."""

    def work(outcome: Outcome, budget: Budget) -> None:
        for i, (name, config) in enumerate(sizes.vaes.items()):
            own = Budget(max(0.0, budget.left()) / (len(sizes.vaes) - i))
            _measure(outcome, own, name, lambda form, config=config: _vae_step(config, form, sizes), sizes)

    return work


def flow_steps(sizes: Sizes) -> Callable[[Outcome, Budget], None]:
    """Return a part that measures the flow."""

    def work(outcome: Outcome, budget: Budget) -> None:
        _measure(outcome, budget, sizes.dit[0], lambda form: _flow_step(form, sizes), sizes)

    return work


Step = tuple[Callable[[], object], float]  # a training step, and its operations


def _measure(outcome: Outcome, budget: Budget, name: str, build: Callable[[Form], Step], sizes: Sizes) -> None:
    """Add rows of every form for which there is time; a form that fails is named, and the others go on."""
    eager: dict[Form, float] = {}
    for form in forms(sizes):
        if budget.left() < 0:
            outcome.notes.append(f"{name}.{form.name}: not reached in time")
            continue
        try:
            step, flops = build(form)
            found = timed(step, sizes.device, seconds=sizes.seconds)
        except torch.cuda.OutOfMemoryError:
            outcome.notes.append(f"{name}.{form.name}: out of memory")
            continue
        except Exception as error:
            outcome.errors.append(f"{name}.{form.name}: {described(error)}")
            continue
        finally:
            step = None
            gc.collect()
            free(sizes.device)
        rate = form.batch / found.seconds
        baseline = eager.get(Form(form.precision, form.batch, False)) if form.compiled else None
        eager.setdefault(form, rate)
        outcome.rows += rows_of(f"{name}.step.{form.name}", rate, found, flops, form.precision, sizes, baseline)


def rows_of(
    name: str, rate: float, found: Timed, flops: float, precision: str, sizes: Sizes, baseline: float | None = None
) -> list[Measured]:
    """Return rows of cells/s, and of MFU and peak memory where they are known."""
    spread = (rate * found.seconds / found.slowest, rate * found.seconds / found.fastest)
    rows = [Measured(name, rate, "cells/s", baseline, baseline and rate / baseline, found.n, spread)]
    share = mfu_of(flops, found.seconds, sizes.device, precision)
    if share is not None:
        rows.append(Measured(f"{name}.mfu", share, "share of the peak", n=found.n))
    if found.peak_bytes is not None:
        rows.append(Measured(f"{name}.peak_memory", found.peak_bytes / 2**30, "GiB", n=found.n))
    return rows


def _vae_step(config: VAEConfig, form: Form, sizes: Sizes) -> Step:
    torch.manual_seed(0)
    vae = VAE(config, n_genes=sizes.n_genes).to(sizes.device)
    cells = make_cells(form.batch, sizes)
    probability = gene_probabilities(torch.ones(sizes.n_genes), sizes.scored).to(sizes.device)
    sample = sample_genes(probability, generator(0, 1, 2))
    step = _trained(vae, form, sizes, lambda: vae(cells, sample).mean())
    n = len(sample.gene_ids)
    return step, TRAINING * form.batch * vae_flops(config, n_genes=n, expressed=sizes.expressed)


def _flow_step(form: Form, sizes: Sizes) -> Step:
    torch.manual_seed(0)
    (m, e), config, b = sizes.latent, sizes.dit[1], form.batch
    dit = DiT(config, n_latent_tokens=m, latent_width=e, n_classes={"cell_type": CLASSES}).to(sizes.device)
    x0, x1 = (torch.randn(b, m, e, device=sizes.device) for _ in range(2))
    draws = Draws(x0, torch.rand(b, device=sizes.device), torch.rand(b, 2, device=sizes.device))
    ids = {"cell_type": torch.randint(0, CLASSES, (b,), device=sizes.device)}
    path = PathConfig()
    step = _trained(dit, form, sizes, lambda: flow_losses(dit, x1, draws, ids, path).mean())
    return step, TRAINING * b * dit_flops(config, n_latent_tokens=m, latent_width=e)


def _trained(network: nn.Module, form: Form, sizes: Sizes, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """Return a call that takes a training step with our AdamW."""
    if form.compiled:
        torch.compiler.reset()  # shapes of the model before
        compile_blocks(network, backend=sizes.backend)
    optimizer = adamw(network, OptimizerConfig())

    def step() -> None:
        optimizer.zero_grad()
        with products(form.precision, sizes.device):
            loss().backward()
        optimizer.step()

    return step
