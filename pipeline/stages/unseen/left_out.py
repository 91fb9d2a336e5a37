"""Trains a flow without some combinations and predicts them: one committed file for each seed and group.

A killed job finds the files that are there and makes the others, to the same numbers: a training is a function of its
seed, of the cells and of the settings.

Shape letters: k combinations, g genes, w ways, a answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.job import PredictErrorConfig
from pipeline.core.files import replaces
from pipeline.core.progress import ProgressWriter
from pipeline.stages.unseen.screen import TrainingScreen
from pipeline.stages.unseen.ways import WAYS, PredictedCells, Predictor
from scldm.checkpoints.native import LoadedFlow, LoadedVAE, class_features
from scldm.flow.config import PathConfig
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.perturbation.free_answers import CONTROL, FREE_ANSWERS, free_answers
from scldm.metrics.perturbation.leave_out import energy_over_floor
from scldm.metrics.perturbation.measures import pearson
from scldm.metrics.perturbation.screen import Combination, Screen
from scldm.nn.kernels.precision import Precision, set_precision
from scldm.optim.config import EMAConfig
from scldm.optim.short_flow import ShortTraining, new_dit, train_flow

OURS, POOLED = "generated", "pooled"
ANSWERS = (OURS, POOLED, *FREE_ANSWERS)
MEASURES = ("energy_over_floor", "delta_pearson")
FIXED = 1 << 20  # added to the seed of fine-tuning, so that its order is not that of the base
SCORED = 2  # stream of the cells of a side that are scored
N_PCS, N_TOP_GENES, MOST_CELLS = 30, 2_000, 500  # of the space, and cells of a side in distances


@dataclass(frozen=True)
class Group:
    """Combinations that one training does not see, or those that were never measured."""

    name: str  # of its files
    pairs: tuple[Combination, ...]
    measured: bool  # whether the answers can be scored


@dataclass(frozen=True)
class GroupResult:
    """What one training says of its group."""

    means: np.ndarray  # (k, w, g) float32
    scores: np.ndarray  # (k, a, 2), NaN if they were not measured


class LeaveOut:
    """Trains and predicts.

    Args:
        config: Settings of the stage.
        vae: The VAE.
        cells: Training cells.
        z: Their latents, (n, m, e).
        folder: Of the files; exists.
        seed: Seed of the job; each training adds its own number.
        progress: Written after each step of a training.
        device: Of the networks.
        precision: Of the flows that predict; trainings are fp32.
    """

    def __init__(
        self, config: PredictErrorConfig, vae: LoadedVAE, cells: TrainingScreen, z: Tensor, folder: Path, *, seed: int,
        progress: ProgressWriter, device: torch.device, precision: Precision = "fp32",
    ):  # fmt: skip
        self.config, self.vae, self.cells, self.z = config, vae, cells, z
        self.folder, self.seed, self.progress, self.device, self.precision = folder, seed, progress, device, precision
        self.path = PathConfig()
        self.done = self.total = 0

    def run(self, groups: Sequence[Group]) -> list[list[GroupResult]]:
        """Return the results by seed and group; those that are there are read."""
        config = self.config
        self.total = config.seeds * (config.base_steps + len(groups) * config.steps)
        found = []
        for number in range(config.seeds):
            files = [self.folder / f"seed{number}-{group.name}.npz" for group in groups]
            kept = [_read(file) for file in files]
            base = None if all(result is not None for result in kept) else self._base(number)
            self.done += config.base_steps
            results = []
            for group, file, result in zip(groups, files, kept, strict=True):
                if result is None:
                    assert base is not None
                    result = self._result(number, group, base)
                    self._write(file, result)
                self.done += config.steps
                self.progress.update(self.done, self.total)
                results.append(result)
            found.append(results)
        return found

    # ---- trainings -------------------------------------------------------------------------------------------------
    def _base(self, number: int) -> dict[str, Tensor]:
        """Return the weights after training on the control cells of all contexts."""
        file = self.folder / f"seed{number}-base.safetensors"
        if not file.is_file():
            screen = self.cells.screen
            rows = np.flatnonzero(screen.treatment == screen.control)
            state = self._trained(None, rows, self.config.base_steps, seed=self.seed + number)
            with replaces(file) as tmp:
                save_file({name: t.contiguous().cpu() for name, t in state.items()}, tmp)
        return load_file(file)

    def _trained(
        self, start: Mapping[str, Tensor] | None, rows: np.ndarray, steps: int, *, seed: int
    ) -> dict[str, Tensor]:
        config, shape = self.config, (self.z.shape[1], self.z.shape[2])
        dit = new_dit(
            config.model, latent_shape=shape, n_classes=self.cells.vocabulary.n_classes, seed=seed,
            features=class_features(self.cells.vocabulary),
        )  # fmt: skip
        if start is not None:
            dit.load_state_dict(dict(start))
        training = ShortTraining(steps, config.batch_size, config.optimizer, EMAConfig(decay=0.99))
        at = torch.from_numpy(rows)
        return train_flow(
            dit.to(self.device), self.z[at], {name: ids[at] for name, ids in self.cells.ids.items()}, training,
            path=self.path, label_dropout=config.model.label_dropout, seed=seed,
            progress=lambda step: self.progress.update(self.done + step, self.total),
        )  # fmt: skip

    def _flow(self, number: int, left_out: Sequence[Combination], base: Mapping[str, Tensor]) -> LoadedFlow:
        """Return a flow that was trained on all cells but some."""
        members, n = self.cells.screen.members, len(self.cells.joinids)
        gone = np.concatenate([members[pair] for pair in left_out]) if left_out else np.zeros(0, np.int64)
        rows = np.setdiff1d(np.arange(n), gone)
        state = self._trained(base, rows, self.config.steps, seed=FIXED + self.seed + number)
        shape, vocabulary = self.z.shape[1:], self.cells.vocabulary
        dit = new_dit(
            self.config.model, latent_shape=(shape[0], shape[1]), n_classes=vocabulary.n_classes, seed=0,
            features=class_features(vocabulary),
        )  # fmt: skip
        dit.load_state_dict(state)
        frozen = dit.eval().requires_grad_(False).to(self.device)
        set_precision(frozen, self.precision)
        return LoadedFlow(frozen, self.path, self.cells.vocabulary, self.vae.library_sizes, shape[0], shape[1])

    def _result(self, number: int, group: Group, base: Mapping[str, Tensor]) -> GroupResult:
        left_out = group.pairs if group.measured else ()
        known = self.cells.screen.without(left_out)
        config, seed = self.config, self.seed + number
        predict = Predictor(
            self.vae, self._flow(number, left_out, base), self.cells, self.z, config.start or "noise",
            config.sampler_steps, config.cells, seed,
        )  # fmt: skip
        weights = predict.weights(known)
        score = self._scorer(known, seed) if group.measured else None
        means, scores = [], []
        for pair in group.pairs:
            found = predict(known, pair, weights)
            means.append([found.means[way] for way in WAYS])
            scores.append(np.full((len(ANSWERS), 2), np.nan) if score is None else score(pair, found))
        g = self.cells.vocabulary.n_genes
        return GroupResult(
            np.array(means, np.float32).reshape(len(means), len(WAYS), g),
            np.array(scores).reshape(len(scores), len(ANSWERS), 2),
        )

    def _scorer(self, known: Screen, seed: int) -> Callable[[Combination, PredictedCells], np.ndarray]:
        """Return a function that scores all answers for a combination, (a, 2)."""
        n_pcs = min(N_PCS, known.counts.shape[0] - 1, known.counts.shape[1] - 1)
        space = RealSpace.fit(known.counts, n_top_genes=N_TOP_GENES, n_pcs=n_pcs, seed=0)

        def score(pair: Combination, found: PredictedCells) -> np.ndarray:
            real = log1p_cp10k(self.cells.screen.cells(*pair)).toarray()
            free = free_answers(known, *pair, np.random.default_rng(seed))
            control = free[CONTROL].log.mean(0)
            # Pooled cells keep what is their control cells' own, so that their shift is from these and not from all.
            bases = dict.fromkeys(ANSWERS, control) | {POOLED: found.control}
            ours = {OURS: found.counts, POOLED: found.pooled}
            logs = {name: log1p_cp10k(x).toarray() for name, x in ours.items()} | {n: x.log for n, x in free.items()}
            rng = np.random.default_rng([seed, SCORED])
            points = {name: _points(space, log, rng) for name, log in ({"measured": real} | logs).items()}
            return np.array(
                [
                    (
                        energy_over_floor(points["measured"], points[name]),
                        pearson(real.mean(0) - control, logs[name].mean(0) - bases[name]),
                    )
                    for name in ANSWERS
                ]
            )

        return score

    # ---- files -----------------------------------------------------------------------------------------------------
    def _write(self, file: Path, result: GroupResult) -> None:
        with replaces(file) as tmp, tmp.open("wb") as out:
            np.savez(out, means=result.means, scores=result.scores, ways=WAYS, answers=ANSWERS)


def _points(space: RealSpace, log: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the coordinates of at most MOST_CELLS cells, drawn by rng: cells are in the order of their file."""
    rows = slice(None) if len(log) <= MOST_CELLS else np.sort(rng.choice(len(log), MOST_CELLS, replace=False))
    return (log[rows][:, space.genes] - space.mean) @ space.axes.T


def _read(file: Path) -> GroupResult | None:
    """Return the result in a file; None if there is none, or one of a version that made other predictions."""
    if not file.is_file():
        return None
    with np.load(file) as found:
        made = [tuple(found[name].tolist()) if name in found else () for name in ("ways", "answers")]
        return GroupResult(found["means"], found["scores"]) if made == [WAYS, ANSWERS] else None
