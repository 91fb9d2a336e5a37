"""Predicts the cells of a combination from the control cells of its context, in every way that is compared.

    noise                 new cells from noise, under the labels of the combination
    latents               control cells back to noise under their own labels, and forwards under the new ones
    guided                the first or the second, with guidance 2
    shift                 control cells + the mean shift of the other contexts
    pooled                the second in the cell's own counts, with a mean that the free answers have a say in
    additive NB, linear   the other two free answers in that mean

Cells are drawn of the first or the second, as the job asks, and of the pooled way; of the others the means are
compared.

Shape letters: b cells, g genes, m latent tokens, e latent width, k predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pipeline.stages.unseen.pooling import pool_weights, pooled_shift
from pipeline.stages.unseen.screen import TrainingScreen
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.flow.config import SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.generation.draws.change import Change
from scldm.generation.draws.changed_counts import change_counts
from scldm.generation.draws.matched_mean import matched_factors
from scldm.generation.perturbed import ADDED, KEPT
from scldm.generation.real_cells import draw_sparse, fresh_noise, under_condition
from scldm.metrics.perturbation.free_answers import CONTROL, LINEAR, NB
from scldm.metrics.perturbation.screen import Combination, Screen
from scldm.nn.vae import CountDistribution

WAYS = ("noise", "latents", "guided", "shift", "pooled", NB, LINEAR)
GUIDANCE = 2.0
TILE = 64  # cells that the networks see at a time
WEIGHTS, POOLED = 33, 34  # streams of draws


@dataclass(frozen=True)
class PredictedCells:
    """A combination as it is predicted."""

    counts: sp.csr_matrix  # (b, g), from noise or from latents, as the job asks
    pooled: sp.csr_matrix  # (b, g)
    control: np.ndarray  # mean log1p CP10k of the control cells that were moved, (g,)
    means: Mapping[str, np.ndarray]  # way -> mean log1p CP10k of expected counts, (g,)


@dataclass(frozen=True)
class Predictor:
    """Trained models, and the cells that predictions start from."""

    vae: LoadedVAE
    flow: LoadedFlow
    cells: TrainingScreen
    z: Tensor  # latents of the cells, (n, m, e)
    start: Literal["noise", "latents"]
    steps: int  # of the sampler
    most: int  # control cells of a combination
    seed: int

    def weights(self, known: Screen) -> np.ndarray:
        """Return the weights of the pooled mean, (k,), from the combinations that the flow was trained on."""
        members = self.cells.screen.members  # `known` has positions of its own

        def change_of(rows: np.ndarray, pair: Combination) -> Change:
            control = (pair[0], known.control)
            order = np.searchsorted(known.members[control], rows)
            return self._moved(members[control][order], pair)

        return pool_weights(known, change_of, np.random.default_rng([self.seed, WEIGHTS]))[0]

    @torch.inference_mode()
    def __call__(self, known: Screen, pair: Combination, weights: np.ndarray) -> PredictedCells:
        """Predict a combination.

        Args:
            known: The cells that the flow was trained on.
            pair: Context and treatment.
            weights: Of the pooled mean, (k,).
        """
        screen = self.cells.screen
        rows = screen.members[pair[0], screen.control]
        rows = np.sort(np.random.default_rng([self.seed, *map(ord, pair[0])]).permutation(rows)[: self.most])
        counts: list[sp.csr_matrix] = []
        logs: dict[str, list[np.ndarray]] = {}
        decoded: dict[str, list[CountDistribution]] = {"shift": [], "latents": []}  # before and after the change
        for at in range(0, len(rows), TILE):
            tile = rows[at : at + TILE]
            size = self._sizes(tile)
            for way, z in self._latents(tile, pair).items():
                out = self._decoded(z, size)
                logs.setdefault(way, []).append(torch.log1p(out.mu / size[:, None] * 1e4).cpu().numpy())
                if way in decoded:
                    decoded[way].append(out)
                if way == self.start:
                    counts.append(draw_sparse(out, self.cells.joinids[tile].tolist(), seed=self.seed))
        means = {way: np.concatenate(parts).mean(0) for way, parts in logs.items()}
        change = _change(screen.counts[rows], decoded["shift"], decoded["latents"])
        pooled, control, shifts = self._pooled(known, pair, change, weights, self.cells.joinids[rows])
        base = means["shift"]  # decoded control cells
        sources = known.sources(*pair)
        shifts["shift"] = np.mean([known.mean(c, pair[1]) - known.mean(c, known.control) for c in sources], axis=0)
        means |= {way: np.maximum(base + shift, 0) for way, shift in shifts.items()}
        return PredictedCells(sp.vstack(counts, format="csr"), pooled, control, means)

    @property
    def device(self) -> torch.device:
        return next(self.flow.dit.parameters()).device

    def _pooled(
        self, known: Screen, pair: Combination, change: Change, weights: np.ndarray, ids: np.ndarray
    ) -> tuple[sp.csr_matrix, np.ndarray, dict[str, np.ndarray]]:
        """Return pooled cells, (b, g), as perturb makes them, the mean of their controls, and shifts of it by way."""
        rng = np.random.default_rng([self.seed, POOLED, *map(ord, "".join(pair))])
        shift, free = pooled_shift(known, pair, change, weights, rng)
        factors = matched_factors(change, shift, rng)
        cells = change_counts(change.times(factors), ids, seed=self.seed, kept_stream=KEPT, added_stream=ADDED)
        control = free[CONTROL].log.mean(0)
        return cells, control, {"pooled": shift} | {name: free[name].log.mean(0) - control for name in (NB, LINEAR)}

    @torch.inference_mode()
    def _moved(self, rows: np.ndarray, pair: Combination) -> Change:
        """Return how control cells change that become a combination."""
        before: list[CountDistribution] = []
        after: list[CountDistribution] = []
        for at in range(0, len(rows), TILE):
            tile = rows[at : at + TILE]
            z, own, target = self._conditions(tile, pair)
            size = self._sizes(tile)
            new = under_condition(self.flow, z, own=own, target=target, sampler=SamplerConfig(steps=self.steps))
            for found, latents in ((before, z), (after, new)):
                found.append(self._decoded(latents, size))
        return _change(self.cells.screen.counts[rows], before, after)

    def _decoded(self, z: Tensor, library_size: Tensor) -> CountDistribution:
        found = self.vae.vae.decode(z, library_size)
        assert isinstance(found, CountDistribution)  # a VAE of expression values is refused before
        return found

    def _sizes(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.cells.screen.counts[rows].sum(1)).ravel()).float().to(self.device)

    def _conditions(self, rows: np.ndarray, pair: Combination) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return latents of control cells, (b, m, e), their own class ids and those of the combination."""
        classes = self.cells.classes(pair)
        own = {name: ids[rows].to(self.device) for name, ids in self.cells.ids.items()}
        target = dict(own)
        for name in self.cells.treatment:
            new = int(self.cells.vocabulary.label(name).encode([classes[name]])[0])
            target[name] = torch.full_like(own[name], new)
        return self.z[rows].to(self.device), own, target

    def _latents(self, rows: np.ndarray, pair: Combination) -> dict[str, Tensor]:
        """Return latents by way, (b, m, e) each; of shift those of the control cells themselves."""
        z, own, target = self._conditions(rows, pair)
        noise = fresh_noise(self.flow, self.cells.joinids[rows].tolist(), seed=self.seed).to(self.device)

        def moved(way: str, guidance: float) -> Tensor:
            sampler = SamplerConfig(steps=self.steps, guidance=guidance)
            if way == "noise":
                return sample_latents(self.flow.dit, noise, target, sampler, self.flow.path)
            return under_condition(self.flow, z, own=own, target=target, sampler=sampler)

        return {"noise": moved("noise", 1.0), "latents": moved("latents", 1.0),
                "guided": moved(self.start, GUIDANCE), "shift": z}  # fmt: skip


def _change(counts: sp.csr_matrix, before: Sequence[CountDistribution], after: Sequence[CountDistribution]) -> Change:
    """Join the tiles of a change of cells with given counts, (n, g), in double precision."""
    theta = [x.theta for x in before]
    parts = [x.mu for x in before], [x.mu for x in after], theta if theta[0].ndim > 1 else [theta[0][None]]
    means = (torch.cat(list(part)).double().cpu().numpy() for part in parts)
    return Change(counts.toarray().astype(np.float64), *means)
