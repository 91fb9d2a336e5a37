"""What a trained model is worth to somebody with few cells: as a tokenizer, fine-tuned, through adapters.

For each pair of sets (`transfer_cells.py`) a model is trained on the source once. Then, for each number of target cells
and seed, every way of `transfer_lines.py` gets as many seconds of the processor, and makes as many cells of the same
classes as are held out of the target. A way is as good as the distance of its cells to held-out real ones is near to
the floor, which is that of as many other real cells, in 30 components fitted on the held-out cells. Distances are
Fréchet, energy and MMD; `excess` is distance minus floor, at least 5 % of the floor.

Rows: `tokenizer.vs_scratch@N` and the like are the geometric mean, over seeds and the three distances, of the excess of
scratch over that of the way; above 1, the way is nearer to the floor. `forgetting`: the same for the source's held-out
cells and the model after over before fine-tuning; above 1, the model has got worse at what it knew.

    python benchmarks/transfer.py --json benchmarks/results/transfer.json        # 110 minutes of one core
    python benchmarks/transfer.py --only patients --seeds 1 --seconds 5 --pretrain 10      # does it run at all

What is there is not made again: results lie in --out, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import transfer_cells
from harness import Row, report
from transfer_cells import Cells, Sets
from transfer_lines import FLOW_SIZES, LABEL, VAE_SIZES, WAYS, Pair, make

from scldm.checkpoints.native import load_flow, load_vae, save_flow, save_vae
from scldm.flow.config import SamplerConfig
from scldm.generation.cell_maker import CellMaker, Recipe
from scldm.metrics.distribution.distances import energy_distance, frechet_distance, mmd2_median
from scldm.metrics.distribution.projection import RealSpace
from scldm.random import generator

ROOT = Path(__file__).resolve().parents[1]
DISTANCES = {"frechet": frechet_distance, "energy": energy_distance, "mmd2": mmd2_median}
N_CELLS = (100, 300, 1_000, 3_000)
SCORED = 1_000  # cells at most
LEAST = 0.05  # of the floor
FORGETFUL = ("finetune", "adapters", "finetune + replay", "adapters + replay")


def pretrained(sets: Sets, folder: Path, seconds: float) -> Pair:
    """The source's models: read where they are, else trained and written."""
    if not (folder / "flow").is_dir():
        pair = make("scratch", sets.source, sets.genes, source=None, old=None, seconds=seconds, seed=0)
        v, f = pair.vae, pair.flow
        save_vae(folder / "vae", v.vae, v.vocabulary, v.library_sizes, card="")
        shape = (f.n_latent_tokens, f.latent_width)
        save_flow(
            folder / "flow", {"model": f.dit.state_dict()}, config=FLOW_SIZES, path=f.path, latent_shape=shape,
            vocabulary=f.vocabulary, library_sizes=f.library_sizes, card="",
        )  # fmt: skip
    return Pair(load_vae(folder / "vae"), load_flow(folder / "flow"), (0, 0))


# ---- scores ------------------------------------------------------------------------------------------------------
class Judge:
    """Distances to held-out cells, and the floor of real cells.

    Args:
        held_out: Cells to be near to.
        real: Other real cells of the same kind.
    """

    def __init__(self, held_out: Cells, real: Cells, seed: int):
        n = min(len(held_out), len(real), SCORED)
        self.cells = held_out[:n]
        self.space = RealSpace.fit(self.cells.counts, n_top_genes=2_000, n_pcs=30, seed=seed)
        self.points = self.space.project(self.cells.counts)
        self.floor = self.distances(real[_matched(self.cells.classes, real.classes, seed)])

    def distances(self, cells: Cells) -> dict[str, float]:
        points = self.space.project(cells.counts)
        return {name: float(f(self.points, points)) for name, f in DISTANCES.items()}

    def excess(self, pair: Pair, seed: int) -> dict[str, float]:
        """Distance of generated cells of the held-out classes, less the floor."""
        found = self.distances(generate(pair, self.cells.classes, seed))
        return {name: max(found[name] - floor, LEAST * floor) for name, floor in self.floor.items()}


def _matched(classes: np.ndarray, among: np.ndarray, seed: int) -> np.ndarray:
    """Positions of as many cells of each class, in a random order; fewer of a class that has not got them."""
    order = torch.randperm(len(among), generator=generator(seed, 9)).numpy()
    names, n = np.unique(classes, return_counts=True)
    return np.concatenate([order[among[order] == name][:k] for name, k in zip(names, n, strict=True)])


def generate(pair: Pair, classes: np.ndarray, seed: int) -> Cells:
    """Cells of the given classes; a class that the model has never seen is asked for without its label."""
    label, sizes = pair.flow.vocabulary.labels[0], pair.flow.library_sizes
    names, n = np.unique(classes, return_counts=True)
    known = [name if label.knows(name) else None for name in names]
    statistics_of = [sizes.of({LABEL: name}) for name in known]
    ids = label.encode(known)
    recipe = Recipe(
        np.cumsum(n).astype(np.int64), {LABEL: ids}, {},
        np.array([s.mean for s in statistics_of]), np.array([s.sd for s in statistics_of]),
    )  # fmt: skip
    made = CellMaker(pair.vae, pair.flow, recipe, sampler=SamplerConfig(), seed=seed).cells(0, recipe.n_cells)
    return Cells(sp.vstack([part.values for part in made], format="csr").astype(np.float32), np.repeat(names, n))


# ---- runs --------------------------------------------------------------------------------------------------------
def run(name: str, args: argparse.Namespace) -> None:
    """All trainings of a pair of sets that are not there yet."""
    file = args.out / name / "results.jsonl"
    done = {(r["seed"], r["n"], r["way"]) for r in read(file)}
    for seed in range(args.seeds):
        sets = transfer_cells.read(args.data, name, seed)
        source = pretrained(sets, args.out / name / "source", args.pretrain)
        new = Judge(sets.target_held_out, sets.target, seed)
        old = Judge(sets.source_held_out, sets.source, seed)
        before = old.excess(source, seed)
        for n in [n for n in args.cells if n <= len(sets.target)]:
            for way in args.ways:
                if (seed, n, way) in done:
                    continue
                pair = make(
                    way, sets.target[:n], sets.genes, source=source, old=sets.source, seconds=args.seconds, seed=seed
                )
                found: dict[str, Any] = {
                    "seed": seed, "n": n, "way": way, "steps": pair.steps, "excess": new.excess(pair, seed),
                    "floor": new.floor,
                }  # fmt: skip
                if way in FORGETFUL:
                    found |= {"old": old.excess(pair, seed), "old_before": before, "old_floor": old.floor}
                with file.open("a") as out:
                    out.write(json.dumps(found) + "\n")
                print(name, found, flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- rows --------------------------------------------------------------------------------------------------------
def rows(results: list[dict[str, Any]], suffix: str) -> list[Row]:
    """Rows of a pair of sets; the suffix names it if there are several."""
    by_key = {(r["seed"], r["n"], r["way"]): r for r in results}
    found = []
    for n in sorted({r["n"] for r in results}):
        for way in WAYS[1:]:
            pairs = [
                (by_key[s, n, "scratch"]["excess"], r["excess"])
                for (s, k, w), r in by_key.items()
                if (k, w) == (n, way) and (s, n, "scratch") in by_key
            ]
            found += _row(f"{way.replace(' + ', '_')}.vs_scratch@{n}{suffix}", pairs)
        for way in FORGETFUL:
            pairs = [(r["old"], r["old_before"]) for (_, k, w), r in by_key.items() if (k, w) == (n, way)]
            found += _row(f"forgetting.{way.replace(' + ', '_')}@{n}{suffix}", pairs)
    return found


def _row(name: str, pairs: list[tuple[dict[str, float], dict[str, float]]]) -> list[Row]:
    """The geometric mean of ratios first / second; the spread is over seeds."""
    if not pairs:
        return []
    each = [_mean(a[d] / b[d] for d in DISTANCES) for a, b in pairs]
    other, ours = (_mean(x[side]["frechet"] for x in pairs) for side in (0, 1))
    return [Row(name, ours, "Fréchet above floor", other, _mean(each), len(each), (min(each), max(each)))]


def _mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "transfer")
    parser.add_argument("--only", choices=list(transfer_cells.PAIRS), action="append")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--cells", type=int, nargs="+", default=list(N_CELLS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="of the processor, for each training")
    parser.add_argument("--pretrain", type=float, default=300, help="the same, for the source's models")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"{args.data} is not there: real cells, which are not part of the repository")
    torch.set_num_threads(1)
    names = args.only or list(transfer_cells.PAIRS)
    for name in names:
        run(name, args)
    found = {name: read(args.out / name / "results.jsonl") for name in names}
    more = {"seconds": args.seconds, "pretrain": args.pretrain, "vae": VAE_SIZES.model_dump(mode="json")}
    report(
        [row for name in names for row in rows(found[name], f" {name}" if len(names) > 1 else "")],
        args.json,
        **more,
        found=found,
    )


if __name__ == "__main__":
    main()
