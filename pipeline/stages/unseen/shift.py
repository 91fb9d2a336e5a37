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
from pipeline.data.loading.blocks import LABEL
from pipeline.inference.applier import ApplierSpec, OutputLayout, Tile, TileOutput
from pipeline.inference.apply_job import Pool, run_batches
from pipeline.inference.models import ModelPaths, check_target
from pipeline.inference.rows import SourceRows
from pipeline.report.combinations import JOIN
from pipeline.stages.unseen.screen import read_screen
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.generation.shift_draw import shifted_counts
from scldm.metrics.perturbation.screen import MIN_CELLS
from scldm.metrics.perturbation.shift import CountShift

if TYPE_CHECKING:
    import torch

    from scldm.checkpoints.native import LoadedVAE

SHIFTS = "shifts.npz"  # in the folder of the stage
MOST_CELLS = 50_000  # training cells that the shift is learned from, drawn by seed


class CountShifter:
    """Shifts the counts of tiles of cells."""

    synthetic, encodes = True, False
    vae: LoadedVAE | None = None  # no network is used

    def __init__(self, spec: ApplierSpec, device: torch.device):
        self.config, self.seed = cast(PerturbConfig, spec.config), spec.seed
        self.vocabulary = Vocabulary.load(Path(spec.models.vae) / "vocabulary.json")
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
        obs = {f"to_{name}": [value] * len(tile.ids) for name, value in self.config.to.items()}
        return TileOutput(values=values, obs=obs)


def run_shift(config: PerturbConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Run the stage; returns the facts of `run_batches`, and the contexts that each shift was learned from."""
    ingest = context.inputs["ingest"]
    vocabulary = Vocabulary.load(ingest.path("vocabulary"))
    check_target(config, vocabulary)
    if not [x for x in vocabulary.labels if x.name not in config.to]:
        raise InputError(
            f"to changes all labels of the data ({', '.join(config.to)}), and method: shift learns from other contexts "
            "with the same treatment; keep a label, such as the cell type, out of it"
        )
    learned = Learned(config, context, vocabulary)
    layout = OutputLayout(genes=True, values="counts", obs={f"to_{label}": object for label in config.to})
    facts = run_batches(
        config, context, stage="perturb", processor=CountShifter, layout=layout, pool=pool,
        models=ModelPaths(str(Path(ingest.folder).resolve())), origin={"data": str(ingest.facts.get("digest", ""))},
        prepare=learned,
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
        names = [label.name for label in self.vocabulary.labels]
        codes = rows.table[[LABEL + x for x in names]].to_numpy()
        keys, n_cells = np.unique(codes, axis=0, return_counts=True)
        classes = [
            {label.name: label.classes[i] for label, i in zip(self.vocabulary.labels, key, strict=True)} for key in keys
        ]
        shifts, problems = [], []
        known = read_screen(
            self.context.inputs["ingest"], {x: classes[0][x] for x in self.config.to}, max_cells=MOST_CELLS,
            seed=self.context.seed,
        ) if classes else None  # fmt: skip
        for own, n in zip(classes, n_cells, strict=True):
            assert known is not None
            pair, (_, target) = known.pair(own), known.pair({**own, **self._target})
            treated = {t for _, t in known.screen.members}
            where = f"source: {n} cells are {JOIN.join(pair)}"
            if pair[1] not in treated:
                problems.append(f"{where}, and no training cell is {pair[1]}, where the shift starts; leave them out")
                continue
            screen = replace(known.screen, control=pair[1])
            if not screen.sources(pair[0], target):
                problems.append(
                    f"{where}; no other context has {MIN_CELLS} training cells of both {target} and {pair[1]}, so that "
                    "nothing is known of this shift"
                )
                continue
            shifts.append(CountShift.learn(screen, pair[0], target))
            self.sources[JOIN.join((*pair, "to", target))] = list(shifts[-1].sources)
        if problems:
            raise InputError("\n".join(problems))
        self._write(keys, shifts)

    @property
    def _target(self) -> dict[str, str]:
        return {name: value for name, value in self.config.to.items() if value is not None}

    def _write(self, keys: np.ndarray, shifts: Sequence[CountShift]) -> None:
        g = self.vocabulary.n_genes
        arrays: Mapping[str, np.ndarray] = {
            "keys": keys,
            "added": np.array([s.added for s in shifts]).reshape(len(shifts), g),
            "kept": np.array([s.kept for s in shifts]).reshape(len(shifts), g),
        }
        with replaces(self.context.folder / SHIFTS) as tmp, tmp.open("wb") as out:
            np.savez(out, **arrays)
