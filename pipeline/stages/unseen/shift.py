"""`method: shift` of perturb: the mean change of the other contexts, applied to the counts of real cells.

It is the free answer `shift in counts`, learned from the training cells of the pipeline: molecules are added, or lost
one by one. No model is used. The draw of a cell is a function of the seed and the cell alone.

Shape letters: b cells of a tile, g genes, k shifts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import scipy.sparse as sp

from pipeline.config.apply import PerturbConfig
from pipeline.config.context import StageContext
from pipeline.core.files import replaces
from pipeline.inference.applier import ApplierSpec, OutputLayout, Tile, TileOutput
from pipeline.inference.apply_job import Pool, run_batches
from pipeline.inference.models import ModelPaths, check_target
from pipeline.inference.rows import SourceRows
from pipeline.stages.unseen.asked import require_context
from pipeline.stages.unseen.beside import Beside
from pipeline.stages.unseen.screen import read_target_screen, source_combinations, target_of
from scldm.data.vocabulary import Vocabulary
from scldm.generation.draws.shift_draw import shifted_counts
from scldm.metrics.perturbation.shift import CountShift

if TYPE_CHECKING:
    import torch

    from scldm.checkpoints.native import LoadedFlow, LoadedVAE

SHIFTS = "shifts.npz"  # in the folder of the stage


class CountShifter:
    """Shifts the counts of tiles of cells."""

    synthetic, encodes = True, False
    vae: LoadedVAE | None = None  # no network is used
    flow: LoadedFlow | None = None

    def __init__(self, spec: ApplierSpec, device: torch.device):
        self.config, self.seed = cast(PerturbConfig, spec.config), spec.seed
        self.vocabulary = Vocabulary.load(Path(spec.models.vae) / "vocabulary.json")
        self.to = target_of(self.config, self.vocabulary)
        with np.load(spec.rows.parent / SHIFTS) as found:
            self.keys, self.added, self.kept = found["keys"], found["added"], found["kept"]

    def __call__(self, tile: Tile) -> TileOutput:
        offsets, genes, counts = (x.cpu().numpy() for x in (tile.cells.offsets, tile.cells.gene_ids, tile.cells.counts))
        x = sp.csr_matrix((counts, genes, offsets), shape=(len(tile.ids), self.vocabulary.n_genes))
        own = np.stack([tile.conditions[label.name].cpu().numpy() for label in self.vocabulary.labels], axis=1)
        parts, order = [], []
        for key, added, kept in zip(self.keys, self.added, self.kept, strict=True):
            rows = np.flatnonzero((own == key).all(1))
            if len(rows):
                parts.append(shifted_counts(x[rows], added, kept, tile.ids[rows], seed=self.seed))
                order.append(rows)
        values = sp.vstack(parts, format="csr")[np.argsort(np.concatenate(order), kind="stable")]
        obs = {f"to_{name}": [value] * len(tile.ids) for name, value in self.to.items()}
        return TileOutput(values=values, obs=obs)


def run_shift(config: PerturbConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Run the stage; returns the facts of `run_batches`, and the contexts that each shift was learned from."""
    ingest = context.inputs["ingest"]
    vocabulary = Vocabulary.load(ingest.path("vocabulary"))
    check_target(config, vocabulary)
    require_context(config.to, vocabulary, "shift")
    learned = Learned(config, context, vocabulary)
    layout = OutputLayout(genes=True, values="counts", obs={f"to_{label}": object for label in config.to})
    facts = run_batches(
        config, context, stage="perturb", processor=CountShifter, layout=layout, pool=pool,
        models=ModelPaths(str(Path(ingest.folder).resolve())), origin={"data": str(ingest.facts.get("digest", ""))},
        prepare=learned, columns=Beside(config, context, vocabulary),
    )  # fmt: skip
    return facts | {"method": "shift", "learned_from": learned.sources}


@dataclass
class Learned:
    """Learns the shift of every context and class that the cells of a source have, and writes them for the actors."""

    config: PerturbConfig
    context: StageContext
    vocabulary: Vocabulary
    sources: dict[str, Sequence[str]] = field(default_factory=dict)  # combination -> contexts that it is learned from

    def __call__(self, rows: SourceRows) -> None:
        """Learn the shifts.

        Raises:
            InputError: Some of them cannot be learned; all are listed.
        """
        if rows.table.empty:
            self._write([], [])
            return
        known = read_target_screen(self.config, self.context, rows, self.vocabulary)
        keys, shifts = [], []
        for of in source_combinations(rows, known, target_of(self.config, self.vocabulary)):
            shifts.append(CountShift.learn(replace(known.screen, control=of.control), of.context, of.treatment))
            keys.append(of.key)
            self.sources[of.name] = list(shifts[-1].sources)
        self._write(keys, shifts)

    def _write(self, keys: Sequence[np.ndarray], shifts: Sequence[CountShift]) -> None:
        g = self.vocabulary.n_genes
        arrays: Mapping[str, np.ndarray] = {
            "keys": np.array(keys, dtype=np.int64).reshape(len(keys), len(self.vocabulary.labels)),
            "added": np.array([s.added for s in shifts]).reshape(len(shifts), g),
            "kept": np.array([s.kept for s in shifts]).reshape(len(shifts), g),
        }
        with replaces(self.context.folder / SHIFTS) as tmp, tmp.open("wb") as out:
            np.savez(out, **arrays)
