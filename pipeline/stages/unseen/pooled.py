"""`method: pooled` of perturb: cells that the flow carries, with a mean that other contexts have a say in.

The flow says how each cell changes. The mean change of a gene is a weighted average of four predictions: the flow's,
and three that the other contexts give for free (`scldm.metrics.perturbation.pooled`). One factor per gene and context
brings the cells there (`scldm.generation.draws.matched_mean`). Weights are learned from measured combinations, and
factors are fitted on some of the source's cells, once, before any shard is made.

Shape letters: b cells of a tile, n cells of a combination, g genes, k combinations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from pipeline.config.apply import PerturbConfig
from pipeline.config.context import StageContext
from pipeline.core.files import replaces
from pipeline.data.loading.blocks import LABEL, SomaRows
from pipeline.inference.applier import JOINID, ApplierSpec, OutputLayout, Tile, tile_of
from pipeline.inference.apply_job import Pool, run_batches
from pipeline.inference.models import ModelPaths, check_target, draws_counts, latent_width, locate_models
from pipeline.inference.rows import SourceRows
from pipeline.report.combinations import JOIN
from pipeline.stages.unseen.asked import require_context
from pipeline.stages.unseen.beside import Beside
from pipeline.stages.unseen.perturber import Perturber
from pipeline.stages.unseen.pooling import pool_weights, pooled_shift
from pipeline.stages.unseen.screen import (
    SourceCombination,
    TrainingScreen,
    read_target_screen,
    source_combinations,
    target_of,
)
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.generation.draws.change import Change
from scldm.metrics.perturbation.pooled import FLOW, POOLED
from scldm.metrics.perturbation.screen import MIN_CELLS, Combination, Screen

if TYPE_CHECKING:
    import torch

    from scldm.data.batch import CellBatch
    from scldm.generation.perturbed import Perturbation

log = logging.getLogger(__name__)

FACTORS = "factors.npz"  # in the folder of the stage
LEFT_OUT = 10_000  # stream of the combinations that are left out, beside those of combinations that are asked for
MOST_CELLS = 600  # of a combination that its factors are fitted on, drawn by seed


class PooledPerturber(Perturber):
    """Moves tiles of cells by the flow, with factors of the genes."""

    def __init__(self, spec: ApplierSpec, device: torch.device):
        super().__init__(spec, device)
        with np.load(spec.rows.parent / FACTORS) as found:
            self.keys, self.by_key = found["keys"], found["factors"]  # (k, labels), (k, g)

    def factors(self, tile: Tile) -> np.ndarray:
        """Return the factors of the combination of each cell, (b, g)."""
        own = np.stack([tile.conditions[label.name].cpu().numpy() for label in self.vocabulary.labels], axis=1)
        return self.by_key[(own[:, None] == self.keys[None]).all(2).argmax(1)]


def run_pooled(
    config: PerturbConfig, context: StageContext, pool: Pool | None = None, *, check: Callable[[SourceRows], None]
) -> dict[str, Any]:
    """Run the stage; returns the facts of `run_batches`, and the contexts that each mean was pooled from.

    Args:
        check: Refuses cells that cannot start where the job says.
    """
    models = locate_models(config, context)
    vocabulary = Vocabulary.load(Path(models.vae) / "vocabulary.json")
    check_target(config, vocabulary, str(models.flow), draws_counts=draws_counts(models.vae))
    known = Vocabulary.load(context.inputs["ingest"].path("vocabulary"))
    if (known.feature_ids, known.labels) != (vocabulary.feature_ids, vocabulary.labels):
        raise InputError(
            f"method: pooled learns from the training cells of {context.inputs['ingest'].folder}, and the model was "
            "trained on other genes or classes; leave model out to use the models of the pipeline, or set method=flow"
        )
    require_context(config.to, vocabulary, "pooled")
    layout = OutputLayout(
        genes=True, values="counts", obsm={"X_scldm": latent_width(models.vae)},
        obs={f"to_{label}": object for label in config.to},
    )  # fmt: skip
    fitted = Fitted(config, context, models, vocabulary, check)
    facts = run_batches(
        config, context, stage="perturb", processor=PooledPerturber, layout=layout, pool=pool, prepare=fitted,
        columns=Beside(config, context, vocabulary),
    )  # fmt: skip
    weights = {c: dict(zip((*POOLED, FLOW), w.round(4).tolist(), strict=True)) for c, w in fitted.weights.items()}
    return facts | {"method": "pooled", "learned_from": fitted.sources, "weights": weights}


@dataclass
class Fitted:
    """Fits the factors of every combination that the cells of a source have, and writes them for the actors."""

    config: PerturbConfig
    context: StageContext
    models: ModelPaths
    vocabulary: Vocabulary
    check: Callable[[SourceRows], None]
    sources: dict[str, Sequence[str]] = field(default_factory=dict)  # combination -> contexts that it is learned from
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # control -> weights of the predictions, (k,)

    def __call__(self, rows: SourceRows) -> None:
        """Fit the factors.

        Raises:
            InputError: The training cells say nothing of some combinations, or a combination has too few cells; all
                are listed.
        """
        self.check(rows)
        if rows.table.empty:
            self._write([], [], [])
            return
        known = read_target_screen(self.config, self.context, rows, self.vocabulary)
        combinations = source_combinations(rows, known, target_of(self.config, self.vocabulary))
        if few := [c for c in combinations if len(c.rows) < MIN_CELLS]:
            named = "; ".join(f"{JOIN.join((c.context, c.control))}: {len(c.rows)}" for c in few)
            raise InputError(
                f"source: a mean needs at least {MIN_CELLS} cells of a combination, and some have fewer ({named}); "
                "leave them out with cells, or set method=flow"
            )
        mover = _Mover(self.config, self.context, self.models, rows)
        controls = sorted({c.control for c in combinations})
        self.weights = {name: self._weights(known, name, combinations, mover) for name in controls}
        factors: list[np.ndarray] = []
        shifts: list[np.ndarray] = []
        for i, combination in enumerate(combinations):
            screen = replace(known.screen, control=combination.control)
            name = combination.name
            self.sources[name] = screen.sources(combination.context, combination.treatment)
            rng = np.random.default_rng([self.context.seed, i])
            for found, of in zip((factors, shifts), self._factors(combination, screen, mover, rng), strict=True):
                found.append(of)
            log.info("perturb: the mean of %s is pooled with that of %s", name, ", ".join(self.sources[name]))
        self._write([c.key for c in combinations], factors, shifts)

    def _factors(
        self, combination: SourceCombination, screen: Screen, mover: _Mover, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the factor of each gene, and the shift of the mean that it is for, both (g,)."""
        from scldm.generation.draws.matched_mean import matched_factors

        some = np.sort(rng.permutation(combination.rows)[:MOST_CELLS])
        change, weights = mover.change(some), self.weights[combination.control]
        shift, _ = pooled_shift(screen, (combination.context, combination.treatment), change, weights, rng)
        return matched_factors(change, shift, rng), shift

    def _weights(
        self, known: TrainingScreen, control: str, asked: Sequence[SourceCombination], mover: _Mover
    ) -> np.ndarray:
        """Return the weights of the predictions, (k,), from measured combinations of a control class."""
        screen, rng = replace(known.screen, control=control), np.random.default_rng([self.context.seed, LEFT_OUT])
        wanted = {(c.context, c.treatment) for c in asked}
        weights, n = pool_weights(
            screen, lambda some, pair: mover.change_of_training(known, some, pair), rng, asked=wanted
        )
        named = ", ".join(f"{name} {w:.2f}" for name, w in zip((*POOLED, FLOW), weights, strict=True))
        log.info("perturb: weights of the pooled mean, from %d measured combinations: %s", n, named)
        return weights

    def _write(self, keys: Sequence[np.ndarray], factors: Sequence[np.ndarray], shifts: Sequence[np.ndarray]) -> None:
        n, g = len(keys), self.vocabulary.n_genes
        arrays: dict[str, np.ndarray] = {
            "keys": np.array(keys, dtype=np.int64).reshape(n, len(self.vocabulary.labels)),
            "factors": np.array(factors, dtype=np.float32).reshape(n, g),
            "shift": np.array(shifts, dtype=np.float32).reshape(n, g),  # for readers; the cells follow from the factors
        }
        with replaces(self.context.folder / FACTORS) as tmp, tmp.open("wb") as out:
            np.savez(out, **arrays)


class _Mover:
    """Applies the models to cells, in this process and in fp32: it may have another device than the actors."""

    def __init__(self, config: PerturbConfig, context: StageContext, models: ModelPaths, rows: SourceRows):
        import torch

        from scldm.generation.cell_maker import tile_cells

        self.rows, self.config, self.seed = rows, config, context.seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        spec = ApplierSpec(
            processor=Perturber, config=config, models=models, layout=OutputLayout(), folder=context.folder,
            rows=context.folder, reader=rows.reader, measured=rows.measured, obs_columns=[], categories={},
            provenance={}, seed=context.seed, threads=1, fault="",
        )  # fmt: skip
        self.perturber = Perturber(spec, self.device)
        self.tile = tile_cells(self.perturber.vae, self.device)
        self.measured = None if rows.measured is None else torch.from_numpy(rows.measured).to(self.device)

    def change(self, positions: np.ndarray) -> Change:
        """Return how cells change that are moved as the job asks.

        Args:
            positions: Of the cells in the source, (n,).
        """
        parts = []
        for first in range(0, len(positions), self.tile):
            chosen = self.rows.table.iloc[positions[first : first + self.tile]]
            codes = {x: chosen[LABEL + x].to_numpy().astype(np.int32) for x in self.rows.reader.labels}
            read = self.rows.reader.read(SomaRows(chosen[JOINID].to_numpy().astype(np.int64), codes)).combine_chunks()
            tile = tile_of(
                read, self.rows.reader.labels, max_genes=self.config.max_genes, measured=self.measured,
                seed=self.seed, device=self.device,
            )  # fmt: skip
            parts.append(self._change(tile.cells, tile.seen, self.perturber.perturbation))
        return _joined(parts)

    def change_of_training(self, known: TrainingScreen, positions: np.ndarray, pair: Combination) -> Change:
        """Return how training cells change that become a measured combination.

        Args:
            known: The training cells.
            positions: Of the cells among them, (n,).
            pair: The combination, of the context that the cells have.
        """
        from scldm.data.batch import CellBatch

        classes = known.classes(pair)
        to = replace(self.perturber.perturbation, to={label: classes[label] for label in known.treatment})
        parts = []
        for first in range(0, len(positions), self.tile):
            at = positions[first : first + self.tile]
            conditions = {name: ids[at] for name, ids in known.ids.items()}
            counts = sp.csr_matrix(known.screen.counts[at], dtype=np.float32)
            cells = CellBatch.from_csr(counts, conditions=conditions).to(self.device)
            seen = cells
            if self.config.max_genes is not None:
                from pipeline.data.loading.collate import subsample_genes

                seen = subsample_genes(cells, self.config.max_genes, seed=self.seed)
            parts.append(self._change(cells, seen, to))
        return _joined(parts)

    def _change(self, cells: CellBatch, seen: CellBatch, perturbation: Perturbation) -> Change:
        from scldm.generation.perturbed import change_of_means, move_cells

        vae, flow = self.perturber.vae, self.perturber.flow
        return change_of_means(vae, cells, move_cells(vae, flow, cells, seen, perturbation))


def _joined(parts: Sequence[Change]) -> Change:
    """Return the change of all cells, in double precision."""
    of_cells = all(len(x.theta) == len(x.counts) for x in parts)
    theta = [x.theta for x in parts] if of_cells else [parts[0].theta]
    arrays = [x.counts for x in parts], [x.before for x in parts], [x.after for x in parts], theta
    return Change(*(np.concatenate(list(x)).astype(np.float64) for x in arrays))
