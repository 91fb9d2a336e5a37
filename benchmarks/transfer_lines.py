"""The lines that `transfer.py` compares: how a VAE and a flow come about in a given number of seconds.

    scratch      half of the seconds for a new VAE, half for a new flow
    tokenizer    the source's VAE as it is; all seconds for a new flow
    finetune     both start from the source's weights
    adapters     the same, through low-rank adapters
    … + replay   a share of the cells of every step are cells of the source

Seconds are of the processor (`time.process_time`, one thread), so that other work on the machine takes none away.
Starts, adapters and formats are those of the jobs (`scldm.checkpoints`); the loops are plain ones.

Shape letters: n cells, g genes, b cells of a batch, m latent tokens, e latent width.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from train_small import batches
from transfer_cells import Cells

from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.checkpoints.start_from import Started, adapt, start_flow, start_vae
from scldm.data.batch import CellBatch
from scldm.data.gene_sampling import see_genes
from scldm.data.genes_seen import GenesSeenConfig
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.flow.config import PathConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path
from scldm.metrics.genes.expression import gene_moments
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dispersion import fit_theta
from scldm.nn.dit import DiT, drop_labels
from scldm.nn.likelihood import gene_probabilities, sample_genes
from scldm.nn.vae import VAE
from scldm.optim.adamw import adamw
from scldm.optim.config import EMAConfig, LoraConfig, OptimizerConfig
from scldm.optim.ema import EMA
from scldm.optim.first_weights import start_at_components
from scldm.optim.lora import merged
from scldm.optim.schedule import learning_rate_factor
from scldm.random import generator

LABEL = "class"
VAE_SIZES = VAEConfig(d_model=32, n_layers=2, n_latent_tokens=16, latent_width=16)
FLOW_SIZES = DiTConfig(d_model=96, n_layers=4, n_heads=4, label_dropout=0.1)
SEEN = GenesSeenConfig(mode="share_expressed", share=0.7)
GENES_PER_STEP = 1024
VAE_BATCH, FLOW_BATCH = 32, 128
CHECKS = 10  # validations of a VAE; the weights of the best are kept
VALIDATION, VALIDATION_CELLS = 0.1, 128
THETA_CELLS = FIRST_CELLS = 2_000
REPLAYED, REPLAY_CELLS = 0.25, 5_000
NEW, TUNED, ADAPTED = 4e-3, 1e-3, 4e-3  # learning rates of a VAE; those of a flow are three quarters
VAE_SHARE = {"scratch": 0.5, "finetune": 0.3, "adapters": 0.3}  # of the seconds
STREAM_FLOW, STREAM_GENES = 5, 6  # streams of randomness
WAYS = ("scratch", "tokenizer", "finetune", "adapters", "finetune + replay", "adapters + replay")


@dataclass(frozen=True)
class Pair:
    """A VAE and a flow on its latents."""

    vae: LoadedVAE
    flow: LoadedFlow
    steps: tuple[int, int]  # of the VAE and of the flow


class Budget:
    """Seconds of this process to spend."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, time.process_time()

    @property
    def spent(self) -> float:
        """Share of the seconds, at most 1."""
        return min((time.process_time() - self.start) / self.seconds, 1.0)


def make(
    way: str, cells: Cells, genes: tuple[str, ...], *, source: Pair | None, old: Cells | None, seconds: float, seed: int
) -> Pair:
    """Train a pair on cells in one of the ways.

    Args:
        way: One of `WAYS`.
        source: The source's models; for all ways but scratch.
        old: The source's cells, for replay.
        seconds: Of the processor.
    """
    budget, start = Budget(seconds), way.partition(" ")[0]
    replay = old[:REPLAY_CELLS] if way.endswith("replay") and old is not None else None
    known = () if source is None or start in ("scratch", "tokenizer") else source.flow.vocabulary.labels[0].classes
    vocabulary = vocabulary_of(genes, {*cells.classes, *known})
    if start == "tokenizer":
        assert source is not None
        vae, n_steps = replace(source.vae, vocabulary=vocabulary), 0
    else:
        part = VAE_SHARE[start] * seconds
        vae, n_steps = train_vae(start, cells, vocabulary, source, replay=replay, seconds=part, seed=seed)
    return train_flow(start, cells, vae, source, replay=replay, budget=budget, seed=seed, vae_steps=n_steps)


def vocabulary_of(genes: tuple[str, ...], classes: set[str]) -> Vocabulary:
    return Vocabulary(genes, genes, (LabelVocabulary(LABEL, tuple(sorted(classes))),))


# ---- the VAE -----------------------------------------------------------------------------------------------------
def train_vae(
    start: str, cells: Cells, vocabulary: Vocabulary, source: Pair | None, *, replay: Cells | None, seconds: float,
    seed: int, components: bool = False,
) -> tuple[LoadedVAE, int]:  # fmt: skip
    """Train until the seconds are over; the weights of the best validation are kept, then theta is fitted.

    Args:
        components: Whether a new VAE begins at the principal components of the cells, at half the rate, as the jobs'.
    """
    budget = Budget(seconds)
    n_check = int(np.clip(VALIDATION * len(cells), 10, VALIDATION_CELLS))
    check, own = batch_of(cells[:n_check]), cells[n_check:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE(VAE_SIZES, n_genes=vocabulary.n_genes)
    mean = torch.from_numpy(gene_moments([own.counts], log_normalise=False).mean).float()
    vae.start_at(mean)
    if components:
        start_at_components(vae, [batch_of(own[:FIRST_CELLS])])
    lora = begin(vae, start, lambda: start_vae(vae, vocabulary, source.vae), seed=seed)  # type: ignore[union-attr]
    probability = gene_probabilities(mean, GENES_PER_STEP) if vocabulary.n_genes > GENES_PER_STEP else None
    best, best_nll, n_checks = plain_state(vae, lora), validation(vae, check), 1
    rate = rate_of(start) / 2 if components else rate_of(start)
    for step, rows in enumerate(steps_of(vae, budget, rate, mixed(len(own), replay, VAE_BATCH, seed))):
        batch = replace(batch_of(join(own, replay, rows)), joinids=rows)
        sample = None if probability is None else sample_genes(probability, generator(seed, STREAM_GENES, step))
        seen = see_genes(batch, SEEN, n_genes=vocabulary.n_genes, seed=seed * 1_000_003 + step)
        vae(batch, sample, seen).mean().backward()
        if budget.spent * CHECKS >= n_checks:
            n_checks += 1
            if (nll := validation(vae, check)) < best_nll:
                best, best_nll = plain_state(vae, lora), nll
    trained = VAE(VAE_SIZES, n_genes=vocabulary.n_genes)
    trained.load_state_dict(best)
    trained = trained.eval().requires_grad_(False)
    fit_theta(trained, [batch_of(part) for part in chunks(join_all(own, replay)[:THETA_CELLS])])
    return LoadedVAE(trained, vocabulary, sizes_of(cells)), step + 1


@torch.inference_mode()
def validation(vae: VAE, cells: CellBatch) -> float:
    return float(vae(cells).mean())


# ---- the flow ----------------------------------------------------------------------------------------------------
def train_flow(
    start: str, cells: Cells, vae: LoadedVAE, source: Pair | None, *, replay: Cells | None, budget: Budget, seed: int,
    vae_steps: int,
) -> Pair:  # fmt: skip
    """Train a flow on the latents of the VAE until the budget is spent; the averaged weights are kept."""
    vocabulary, sizes = vae.vocabulary, VAE_SIZES
    everything = join_all(cells, replay)
    z, ids = encode(vae, everything), torch.from_numpy(vocabulary.labels[0].encode(list(everything.classes)))
    shape, path = {"n_latent_tokens": sizes.n_latent_tokens, "latent_width": sizes.latent_width}, PathConfig()
    n_classes = {LABEL: len(vocabulary.labels[0].classes)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = DiT(FLOW_SIZES, **shape, n_classes=n_classes)
    lora = begin(dit, start, lambda: start_flow(dit, vocabulary, source.flow), seed=seed)  # type: ignore[union-attr]
    ema = EMA(dit, EMAConfig())
    size = min(FLOW_BATCH, len(cells))
    rest = Budget(max(budget.seconds * (1 - budget.spent), 1e-3))
    rows_of_steps = mixed(len(cells), replay, size, seed)
    for step, rows in enumerate(steps_of(dit, rest, 0.75 * rate_of(start), rows_of_steps, after=ema.update)):
        g, x1 = generator(seed, STREAM_FLOW, step), z[rows]
        t, x0 = torch.rand(len(x1), generator=g), torch.randn(x1.shape, generator=g)
        known = drop_labels(
            {LABEL: ids[rows]}, n_classes, p=FLOW_SIZES.label_dropout, strategy=dit.strategy, generator=g
        )
        point = sample_path(x0, x1, t, path.path)
        flow_loss(dit(point.x_t, t, known), point, t, path).mean().backward()
    trained = DiT(FLOW_SIZES, **shape, n_classes=n_classes)
    trained.load_state_dict(merged(ema.shadow, lora))
    flow = LoadedFlow(
        trained.eval().requires_grad_(False),
        path,
        vocabulary,
        sizes_of(everything),
        sizes.n_latent_tokens,
        sizes.latent_width,
    )
    return Pair(vae, flow, (vae_steps, step + 1))


@torch.inference_mode()
def encode(vae: LoadedVAE, cells: Cells) -> Tensor:
    """Latents, (n, m, e)."""
    return torch.cat([vae.vae.encode(batch_of(part)) for part in chunks(cells)]).clone()


# ---- both --------------------------------------------------------------------------------------------------------
def begin(module: nn.Module, start: str, take: Callable[[], Started], *, seed: int) -> LoraConfig | None:
    """Give a network the source's weights, and adapters, as far as the way has them."""
    if start not in ("finetune", "adapters"):
        return None
    started = take()
    if start == "finetune":
        return None
    adapt(module, lora := LoraConfig(), started, seed=seed)
    return lora


def rate_of(start: str) -> float:
    return {"finetune": TUNED, "adapters": ADAPTED}.get(start, NEW)


def steps_of(
    module: nn.Module, budget: Budget, rate: float, rows: Iterator[Tensor], after: Callable[[int], None] | None = None
) -> Iterator[Tensor]:
    """Yield the rows of each step, and step the optimizer after it; the schedule follows the share that is spent."""
    config = OptimizerConfig(lr=rate, warmup=0.05, decay=0.4)
    optimizer = adamw(module, config)
    for step in itertools.count(1):
        factor = learning_rate_factor(int(budget.spent * 1000), 1001, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.zero_grad()
        yield next(rows)
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
        if after is not None:
            after(step)
        if budget.spent >= 1:
            return


def mixed(n: int, replay: Cells | None, size: int, seed: int) -> Iterator[Tensor]:
    """Yield rows of n cells; with replay, a share of them are rows n, n + 1, … of the replayed cells."""
    if replay is None:
        yield from batches(n, min(size, n), seed)
    else:
        k = max(1, round(REPLAYED * size))
        for own, old in zip(batches(n, min(size - k, n), seed), batches(len(replay), k, seed + 1), strict=True):
            yield torch.cat([own, old + n])


def join(own: Cells, replay: Cells | None, rows: Tensor) -> Cells:
    index = rows.numpy()
    if replay is None:
        return own[index]
    return join_all(own[index[index < len(own)]], replay[index[index >= len(own)] - len(own)])


def join_all(own: Cells, replay: Cells | None) -> Cells:
    if replay is None:
        return own
    return Cells(sp.vstack([own.counts, replay.counts], format="csr"), np.concatenate([own.classes, replay.classes]))


def plain_state(module: nn.Module, lora: LoraConfig | None) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in merged(module.state_dict(), lora).items()}


def batch_of(cells: Cells) -> CellBatch:
    return CellBatch.from_csr(cells.counts)


def chunks(cells: Cells, size: int = 128) -> Iterator[Cells]:
    for first in range(0, len(cells), size):
        yield cells[first : first + size]


def sizes_of(cells: Cells) -> LibrarySizes:
    return LibrarySizes.fit(np.asarray(cells.counts.sum(1)).ravel(), {LABEL: cells.classes})
