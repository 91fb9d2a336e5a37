"""Predicts the cells of a combination from the control cells of its context, in every way that is compared.

    noise     new cells from noise, under the labels of the combination
    latents   control cells back to noise under their own labels, and forwards under the new ones
    guided    the first or the second, with guidance 2
    shift     control cells + the mean shift of the other contexts

Cells are drawn in the way that the job asks for; of the others the means are compared.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pipeline.stages.unseen.screen import TrainingScreen
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.flow.config import SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.generation.real_cells import draw_sparse, fresh_noise, under_condition
from scldm.metrics.perturbation.screen import Combination, Screen

WAYS = ("noise", "latents", "guided", "shift")
GUIDANCE = 2.0
TILE = 64  # cells that the networks see at a time


@dataclass(frozen=True)
class PredictedCells:
    """A combination as it is predicted."""

    counts: sp.csr_matrix  # (b, g), in the way that the job asks for
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

    @torch.inference_mode()
    def __call__(self, known: Screen, pair: Combination) -> PredictedCells:
        """Predict a combination.

        Args:
            known: The cells that the flow was trained on.
            pair: Context and treatment.
        """
        screen = self.cells.screen
        rows = screen.members[pair[0], screen.control]
        rows = np.sort(np.random.default_rng([self.seed, *map(ord, pair[0])]).permutation(rows)[: self.most])
        counts: list[sp.csr_matrix] = []
        logs: dict[str, list[np.ndarray]] = {way: [] for way in WAYS}
        for at in range(0, len(rows), TILE):
            tile = rows[at : at + TILE]
            ids = self.cells.joinids[tile]
            size = torch.from_numpy(np.asarray(screen.counts[tile].sum(1)).ravel()).float().to(self.device)
            for way, z in self._latents(tile, pair).items():
                out = self.vae.vae.decode(z, size)
                logs[way].append(torch.log1p(out.mu / size[:, None] * 1e4).cpu().numpy())
                if way == self.start:
                    counts.append(draw_sparse(out, ids.tolist(), seed=self.seed))
        means = {way: np.concatenate(parts).mean(0) for way, parts in logs.items()}
        sources = known.sources(*pair)
        shift = np.mean([known.mean(c, pair[1]) - known.mean(c, known.control) for c in sources], axis=0)
        means["shift"] = np.maximum(means["shift"] + shift, 0)
        return PredictedCells(sp.vstack(counts, format="csr"), means)

    @property
    def device(self) -> torch.device:
        return next(self.flow.dit.parameters()).device

    def _latents(self, rows: np.ndarray, pair: Combination) -> dict[str, Tensor]:
        """Return latents by way, (b, m, e) each; of shift those of the control cells themselves."""
        z, classes = self.z[rows].to(self.device), self.cells.classes(pair)
        own = {name: ids[rows].to(self.device) for name, ids in self.cells.ids.items()}
        target = dict(own)
        for name in self.cells.treatment:
            new = int(self.cells.vocabulary.label(name).encode([classes[name]])[0])
            target[name] = torch.full_like(own[name], new)
        noise = fresh_noise(self.flow, self.cells.joinids[rows].tolist(), seed=self.seed).to(self.device)

        def moved(way: str, guidance: float) -> Tensor:
            sampler = SamplerConfig(steps=self.steps, guidance=guidance)
            if way == "noise":
                return sample_latents(self.flow.dit, noise, target, sampler, self.flow.path)
            return under_condition(self.flow, z, own=own, target=target, sampler=sampler)

        return {"noise": moved("noise", 1.0), "latents": moved("latents", 1.0),
                "guided": moved(self.start, GUIDANCE), "shift": z}  # fmt: skip
