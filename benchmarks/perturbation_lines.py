"""How `perturbation.py` predicts a combination that was not measured, and the trainings behind it.

    noise        new cells from noise, under both labels
    carried      control cells back to noise under their own labels, and forward under the new treatment
    transport    control cells forward by a flow that starts at the latents of control cells
    … in counts  the decoder's change from the cell's own latents to the moved ones, applied to the cell's counts:
                 molecules are added, or lost one by one
    pooled       carried in counts, with the mean that the flow and three free answers give together, at weights that
                 are learned from measured combinations
    … x4         with four draws of each control cell: a mean and an order of genes with less noise. Cells of one
                 control cell resemble each other, so that distances between cells are not to be read from it

One VAE serves all; both flows have the same network, steps and labels. In training a label is dropped on its own, so
that the field of a treatment exists without a context.

Shape letters: n cells, b cells of a batch, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from train_small import batches
from transfer_cells import Cells
from transfer_lines import FLOW_SIZES, Budget, chunks, encode, steps_of, train_vae

from scldm.checkpoints.native import LoadedFlow, LoadedVAE, class_features
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path
from scldm.flow.sampler import sample_latents
from scldm.generation.draws.change import Change
from scldm.generation.draws.matched_mean import draw_changed, matched_factors
from scldm.generation.real_cells import draw_sparse, under_condition
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.perturbation.free_answers import COUNTS, Answer, free_answers
from scldm.metrics.perturbation.leave_out import askable
from scldm.metrics.perturbation.pooled import LEFT_OUT_CELLS, MOST_LEFT_OUT, learn_weights, predicted_shifts
from scldm.metrics.perturbation.screen import Screen
from scldm.metrics.perturbation.shift import CountShift
from scldm.nn.dit import DiT, drop_labels
from scldm.optim.config import EMAConfig
from scldm.optim.ema import EMA
from scldm.random import generator

CONTEXT, TREATMENT = "context", "treatment"
RATE, BATCH = 3e-3, 128
STREAM = 8  # of randomness
STEPS = 14
DRAWS = 4
WAYS = ("noise", "carried", "transport", "carried in counts", "transport in counts", "pooled", f"pooled x{DRAWS}")
MORE_COUNTS = f"{COUNTS} x{DRAWS}"
MOVES = ("noise", "carried", "transport")
MATCHED = 600  # cells that factors are fitted on


@dataclass(frozen=True)
class Trained:
    """The models of a training set."""

    vae: LoadedVAE
    noise: LoadedFlow
    transport: LoadedFlow | None


def train(screen: Screen, genes: tuple[str, ...], *, seconds: Sequence[float], seed: int) -> Trained:
    """Train the VAE and the flows on the measured cells.

    Args:
        seconds: Of the VAE, of the flow from noise, and of the one from control cells; 0: without it.
    """
    order = torch.randperm(len(screen.context), generator=generator(seed, STREAM)).numpy()
    screen = screen[order]
    labels = tuple(
        LabelVocabulary(name, tuple(sorted(set(values.tolist()))))
        for name, values in ((CONTEXT, screen.context), (TREATMENT, screen.treatment))
    )
    vocabulary = Vocabulary(genes, genes, labels)
    cells = Cells(sp.csr_matrix(screen.counts, dtype=np.float32), screen.context)
    vae, _ = train_vae("scratch", cells, vocabulary, None, replay=None, seconds=seconds[0], seed=seed, components=True)
    z = encode(vae, cells)
    noise = train_flow(screen, z, vocabulary, seconds=seconds[1], seed=seed, start="noise")
    if not seconds[2]:
        return Trained(vae, noise, None)
    return Trained(vae, noise, train_flow(screen, z, vocabulary, seconds=seconds[2], seed=seed, start="control"))


def train_flow(
    screen: Screen, z: Tensor, vocabulary: Vocabulary, *, seconds: float, seed: int, start: str
) -> LoadedFlow:
    """A flow on latents z (n, m, e), from noise or from control cells of the same context."""
    shape, path = {"n_latent_tokens": z.shape[1], "latent_width": z.shape[2]}, PathConfig()
    ids = {
        name: torch.from_numpy(vocabulary.label(name).encode(values.tolist()))
        for name, values in ((CONTEXT, screen.context), (TREATMENT, screen.treatment))
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = DiT(FLOW_SIZES, **shape, n_classes=vocabulary.n_classes, features=class_features(vocabulary))
    ema, size = EMA(dit, EMAConfig()), min(BATCH, len(z))
    sources = Coupling(screen, z, seed) if start == "control" else None
    steps = steps_of(dit, Budget(seconds), RATE, batches(len(z), size, seed), after=ema.update)
    for step, rows in enumerate(steps):
        g, x1 = generator(seed, STREAM, step), z[rows]
        t = torch.rand(len(x1), generator=g)
        x0 = torch.randn(x1.shape, generator=g) if sources is None else sources.draw(rows, step)
        known = drop_labels(
            {k: v[rows] for k, v in ids.items()}, vocabulary.n_classes, p=FLOW_SIZES.label_dropout,
            strategy="joint", joint_dropout="each", generator=g,
        )  # fmt: skip
        point = sample_path(x0, x1, t, path.path)
        flow_loss(dit(point.x_t, t, known), point, t, path).mean().backward()
    trained = DiT(FLOW_SIZES, **shape, n_classes=vocabulary.n_classes, features=class_features(vocabulary))
    trained.load_state_dict(ema.shadow)
    sizes = LibrarySizes.fit(np.asarray(screen.counts.sum(1)).ravel(), {})
    return LoadedFlow(trained.eval().requires_grad_(False), path, vocabulary, sizes, z.shape[1], z.shape[2])


class Coupling:
    """Control cells of the same context for the cells of a combination, matched by optimal transport within a batch.

    Each treatment is matched on its own: matched together, each would only get the controls that resemble it. Cells of
    a context without controls start from noise. The plain form of `scldm.flow.transport`, in batches.
    """

    def __init__(self, screen: Screen, z: Tensor, seed: int):
        self.z, self.seed, self.context, self.treatment = z, seed, screen.context, screen.treatment
        self.controls = {c: torch.from_numpy(rows) for (c, t), rows in screen.members.items() if t == screen.control}

    def draw(self, rows: Tensor, step: int) -> Tensor:
        """Return a control cell's latents for each cell of the batch, (b, m, e)."""
        g = generator(self.seed, STREAM + 1, step)
        x0 = torch.randn(self.z[rows].shape, generator=g)
        contexts, treatments = self.context[rows.numpy()], self.treatment[rows.numpy()]
        for context, treatment in sorted(set(zip(contexts.tolist(), treatments.tolist(), strict=True))):
            if context not in self.controls:
                continue
            here, pool = np.flatnonzero((contexts == context) & (treatments == treatment)), self.controls[context]
            drawn = self.z[pool[torch.randint(len(pool), (len(here),), generator=g)]]
            cost = torch.cdist(self.z[rows[here]].flatten(1), drawn.flatten(1)) ** 2
            own, other = linear_sum_assignment(cost.numpy())
            x0[here[own]] = drawn[other]
        return x0


# ---- answers -----------------------------------------------------------------------------------------------------
def pool_weights(trained: Trained, screen: Screen, seed: int) -> np.ndarray:
    """Return the weights of the pooled mean, (k,), from measured combinations that are left out of the free answers."""
    rng = np.random.default_rng([seed, STREAM + 4])
    pairs = askable(screen)
    predicted, measured = [], []
    for pair in [pairs[i] for i in rng.permutation(len(pairs))[:MOST_LEFT_OUT]]:
        free = free_answers(screen.without([pair]), *pair, rng)
        rows = rng.permutation(screen.members[pair[0], screen.control])[:LEFT_OUT_CELLS]
        found, _ = moved(trained, cells_of(screen[rows]), screen.control, pair[1], seed, ("carried",))
        predicted.append(predicted_shifts(free, shift_of(found["carried in counts"], screen.counts[rows])))
        measured.append(screen.mean(*pair) - screen.mean(pair[0], screen.control))
    return learn_weights(predicted, measured)


def answers(
    trained: Trained, screen: Screen, context: str, treatment: str, free: Mapping[str, Answer], weights: np.ndarray,
    seed: int,
) -> dict[str, Answer]:  # fmt: skip
    """Return the cells that each way predicts from the context's control cells.

    Args:
        free: The free answers, see `free_answers`.
        weights: Of the pooled mean, see `pool_weights`.
    """
    control = cells_of(screen[screen.members[context, screen.control]])
    found, changes = moved(trained, control, screen.control, treatment, seed)
    counts, rng = control.counts, np.random.default_rng([seed, STREAM])
    shift = weights @ predicted_shifts(free, shift_of(found["carried in counts"], counts))
    change = changes["carried"]
    factors = matched_factors(change[rng.permutation(counts.shape[0])[:MATCHED]], shift, rng)
    drawn = [sp.csr_matrix(draw_changed(change.times(factors), rng)) for _ in range(DRAWS)]
    found |= {"pooled": drawn[0], WAYS[-1]: sp.vstack(drawn, format="csr")}
    learned = CountShift.learn(screen, context, treatment)
    more = sp.vstack([learned.apply(counts, rng) for _ in range(DRAWS)], format="csr")
    return {name: Answer.of(found[name]) for name in WAYS if name in found} | {MORE_COUNTS: Answer.of(more)}


def cells_of(screen: Screen) -> Cells:
    return Cells(sp.csr_matrix(screen.counts, dtype=np.float32), screen.context)


def shift_of(cells: sp.csr_matrix, control: sp.csr_matrix) -> np.ndarray:
    return np.asarray(log1p_cp10k(cells).mean(0) - log1p_cp10k(sp.csr_matrix(control)).mean(0)).ravel()


@torch.inference_mode()
def moved(
    trained: Trained, control: Cells, control_class: str, treatment: str, seed: int, ways: Sequence[str] = MOVES
) -> tuple[dict[str, sp.csr_matrix], dict[str, Change]]:
    """Return cells drawn from the decoder, and how the cells that are moved change."""
    vae, vocabulary, context = trained.vae, trained.noise.vocabulary, control.classes[0]
    drawn: dict[str, list[sp.csr_matrix]] = {}
    means: dict[str, list[Tensor]] = {}
    for i, part in enumerate(chunks(control)):
        z, n, ids = encode(vae, part), len(part), list(range(i * 128, i * 128 + len(part)))
        own, target = (_conditions(vocabulary, context, t, n) for t in (control_class, treatment))
        sampler, size = SamplerConfig(steps=STEPS), torch.from_numpy(np.asarray(part.counts.sum(1)).ravel())
        means.setdefault("own", []).append(vae.vae.decode_mu(z, size))
        for name in ways:
            if name == "noise":
                x0 = torch.randn(z.shape, generator=generator(seed, STREAM + 2, i))
                moved = sample_latents(trained.noise.dit, x0, target, sampler, trained.noise.path)
            elif name == "carried":
                moved = under_condition(trained.noise, z, own=own, target=target, sampler=sampler)
            elif trained.transport is not None:
                moved = sample_latents(trained.transport.dit, z, target, sampler, trained.transport.path)
            else:
                continue
            decoded = vae.vae.decode(moved, size)
            drawn.setdefault(name, []).append(draw_sparse(decoded, ids, seed=seed))
            means.setdefault(name, []).append(decoded.mu)
    cells = {name: sp.vstack(parts, format="csr") for name, parts in drawn.items()}
    found = {name: torch.cat(parts).double().numpy() for name, parts in means.items()}
    theta = decoded.theta.double().numpy().reshape(1, -1)
    counts, rng = control.counts.toarray().astype(np.float64), np.random.default_rng([seed, STREAM + 3])
    changes = {name: Change(counts, found["own"], found[name], theta) for name in cells if name != "noise"}
    cells |= {f"{name} in counts": sp.csr_matrix(draw_changed(x, rng)) for name, x in changes.items()}
    return cells, changes


def _conditions(vocabulary: Vocabulary, context: str, treatment: str, n: int) -> Mapping[str, Tensor]:
    return {
        name: torch.from_numpy(vocabulary.label(name).encode([value] * n))
        for name, value in ((CONTEXT, context), (TREATMENT, treatment))
    }
