"""Whether predicted errors and verdicts hold what they promise, on screens whose combinations are left out in turn.

    python benchmarks/believe.py --scores benchmarks/results/perturbation.json --json benchmarks/results/believe.json
    python benchmarks/believe.py --only gbm --quick                               # does it run at all
    python benchmarks/believe.py runs/*/predict_error/*                           # of finished stages

Each error and verdict is predicted by models that did not see the combination. There are three kinds of errors:

* `--scores`: those of pooled cells in `perturbation.py`, whose trainings are longer. What needs short trainings (the
  disagreement of ways, seeds and guidance) is not known of them; all other features are
* `--only`: on the screens of `perturbation_screens.py` a VAE is trained, and then done what `predict_error` does with
  `method: pooled`, by short trainings
* `folders`: finished predict_error stages

    believe.coverage_90    share of errors inside the 90 % intervals; 0.9 is meant. Screens with fewer than ten
                           combinations have no such intervals
    believe.skill          1 - squared error of the predicted errors over that of their mean, on the scale that is
                           regressed; below 0: worse than the mean of the other combinations
    believe.verdict_right  share of right verdicts (pooled or shift), beside that of the more frequent one for all
    believe.always_pooled  share for which pooled is better: how often saying so every time is right; always_shift

What is there is not made again: results lie in --out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import perturbation_screens
import torch
from harness import Row, report
from perturbation_lines import CONTEXT, TREATMENT, cells_of
from transfer_lines import encode, train_vae

from pipeline.config.stages import PredictErrorConfig
from pipeline.core.progress import ProgressWriter
from pipeline.stages.unseen.left_out import Group, LeaveOut
from pipeline.stages.unseen.outcome import LEFT_OUT, outcome
from pipeline.stages.unseen.screen import TrainingScreen
from scldm.checkpoints.native import LoadedVAE, load_vae, save_vae
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.perturbation.combinations import MOST_CELLS
from scldm.metrics.perturbation.error_model import left_out_predictions, verdicts
from scldm.metrics.perturbation.free_answers import COUNTS, free_answers
from scldm.metrics.perturbation.leave_out import askable, folds, over_floor
from scldm.metrics.perturbation.nearness import as_features, disagreement, indicators, nearness
from scldm.metrics.perturbation.pooled import POOLED
from scldm.metrics.perturbation.screen import Combination, Screen
from scldm.random import generator

ROOT = Path(__file__).resolve().parents[1]
MEASURES = ("delta_pearson", "energy_over_floor")
FACTS = "facts.json"
STREAM = 9  # of randomness
SIZES = {"d_model": 48, "n_layers": 2, "n_heads": 4}  # of the flows
BATCH, SAMPLER_STEPS = 64, 6
FOLDS = 5  # of perturbation.py


def run(name: str, args: argparse.Namespace) -> Path:
    """Leave the combinations of a screen out; return the folder with the tables."""
    folder = args.out / name
    if (folder / FACTS).is_file():
        return folder
    start = time.process_time()
    (folder / "results").mkdir(parents=True, exist_ok=True)
    cells, vae, z = trained(perturbation_screens.read(args.data, name), folder / "model", args.seconds)
    config = PredictErrorConfig.model_validate(
        {"control": {TREATMENT: cells.screen.control}, "folds": args.folds, "seeds": args.seeds, "model": SIZES,
         "base_steps": args.steps[0], "steps": args.steps[1], "cells": args.cells,
         "batch_size": BATCH, "sampler_steps": SAMPLER_STEPS}
    )  # fmt: skip
    parts = folds(askable(cells.screen), config.folds, np.random.default_rng(0))
    groups = [Group(f"group{i}", tuple(part), True) for i, part in enumerate(parts)]
    leave_out = LeaveOut(
        config, vae, cells, z, folder / "results", seed=0, progress=ProgressWriter(folder), device=torch.device("cpu")
    )
    found = outcome(cells, groups, leave_out.run(groups), config.judged)
    found.left_out.to_csv(folder / LEFT_OUT, index=False)
    (folder / FACTS).write_text(json.dumps(found.facts | {"seconds": time.process_time() - start}))
    return folder


def trained(
    study: perturbation_screens.Study, model: Path, seconds: float
) -> tuple[TrainingScreen, LoadedVAE, torch.Tensor]:
    """A VAE of all cells of a screen, and their latents; a model that is there is used."""
    screen = study.screen
    screen = screen[torch.randperm(len(screen.context), generator=generator(0, STREAM)).numpy()]
    columns = {CONTEXT: screen.context, TREATMENT: screen.treatment}
    labels = tuple(LabelVocabulary(name, tuple(sorted(set(of.tolist())))) for name, of in columns.items())
    vocabulary = Vocabulary(study.genes, study.genes, labels)
    cells = cells_of(screen)
    if not model.is_dir():
        new, _ = train_vae("scratch", cells, vocabulary, None, replay=None, seconds=seconds, seed=0)
        save_vae(model, new.vae, vocabulary, new.library_sizes, card="of benchmarks/believe.py")
    vae = load_vae(model)
    ids = {x.name: torch.from_numpy(x.encode(columns[x.name].tolist()).astype(np.int64)) for x in labels}
    contexts, treatments = ({name: (name,) for name in x.classes} for x in labels)
    joinids = np.arange(len(screen.context))
    made = TrainingScreen(screen, joinids, ids, vocabulary, (CONTEXT,), (TREATMENT,), contexts, treatments)
    return made, vae, encode(vae, cells)


# ---- errors of longer trainings ----------------------------------------------------------------------------------
def of_scores(study: perturbation_screens.Study, results: list[dict[str, Any]]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What `outcome` makes of a screen, from the scores of `perturbation.py`: a row for each combination, and facts."""
    screen, scores = study.screen, {(r["seed"], r["context"], r["treatment"]): r["scores"] for r in results}
    of_pair: dict[Combination, list[np.ndarray]] = {}
    for seed in sorted({r["seed"] for r in results}):
        for fold in study.folds(FOLDS, np.random.default_rng(seed)):
            known = screen.without(fold)
            space = RealSpace.fit(known.counts, n_top_genes=2_000, n_pcs=30, seed=0)
            for pair in [pair for pair in fold if (seed, *pair) in scores]:
                found, real = scores[seed, *pair], _points(space, screen, pair, seed)
                energies = [np.log(over_floor(found[who]["energy"], real)) for who in ("pooled", COUNTS)]
                line = [*energies, np.arctanh(found["pooled"]["delta_pearson"]), *_near(known, pair, seed)]
                of_pair.setdefault(pair, []).append(np.array(line))
    values = np.array([np.mean(lines, axis=0) for lines in of_pair.values()])
    energy, shift, delta = values[:, 0], values[:, 1], values[:, 2]
    x = np.hstack([values[:, 3:], indicators(list(of_pair), list(of_pair))])
    said, columns = verdicts(x, energy - shift, x), {}
    for measure, y, back in ((MEASURES[0], delta, np.tanh), (MEASURES[1], energy, np.exp)):
        own = left_out_predictions(x, y)
        columns |= {measure: back(y), f"{measure}_predicted": back(own.value)}
        columns |= {f"{measure}_predicted_{side}": back(getattr(own, side)) for side in ("low", "high")}
    names = dict(zip((CONTEXT, TREATMENT), zip(*of_pair, strict=True), strict=True))
    facts = {
        "coverage_90": own.calibrated,
        "verdict_right": said.right,
        "better_than_shift": float((energy < shift).mean()),
    }
    return pd.DataFrame({**names, **columns, "better": energy < shift, "verdict": said.left_out > 0}), facts


def _near(known: Screen, pair: Combination, seed: int) -> np.ndarray:
    """What is known near a combination without trainings, in the order of FEATURES."""
    numbers, free = nearness(known, *pair), free_answers(known, *pair, np.random.default_rng(seed))
    means = [free[name].log.mean(0) for name in POOLED]
    return as_features(numbers | {"free": disagreement(means, numbers["strength"])})


def _points(space: RealSpace, screen: Screen, pair: Combination, seed: int) -> np.ndarray:
    """Coordinates of measured cells, at most as many as were scored."""
    log = log1p_cp10k(screen.cells(*pair)).toarray()
    some = np.random.default_rng(seed).permutation(len(log))[:MOST_CELLS]
    return (log[some][:, space.genes] - space.mean) @ space.axes.T


# ---- rows --------------------------------------------------------------------------------------------------------
def read(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of the answer that was judged, and the facts, of a screen here or of a finished stage."""
    own = folder / FACTS
    facts = (
        json.loads(own.read_text()) if own.is_file() else json.loads((folder / "manifest.json").read_text())["facts"]
    )
    table = pd.read_csv(folder / LEFT_OUT)
    return table[table["answer"] == facts.get("answer", "generated")].reset_index(drop=True), facts


def covered(table: pd.DataFrame, measure: str) -> np.ndarray:
    """Whether each error lies in its interval."""
    low, high = (table[f"{measure}_predicted_{side}"] for side in ("low", "high"))
    return ((table[measure] >= low) & (table[measure] <= high)).to_numpy()


def skill(table: pd.DataFrame, measure: str) -> float:
    """How much nearer the errors are to what was predicted than to the mean of the other combinations."""
    scale = np.arctanh if measure == "delta_pearson" else np.log
    y, predicted = scale(table[measure].to_numpy()), scale(table[f"{measure}_predicted"].to_numpy())
    others = (y.sum() - y) / (len(y) - 1)
    return 1 - float(((y - predicted) ** 2).sum() / ((y - others) ** 2).sum())


def rows(found: dict[str, tuple[pd.DataFrame, dict[str, Any]]]) -> list[Row]:
    """The rows of all screens together, and of each."""
    made, inside, right, majority, better = [], [], [], [], []
    for name, (table, facts) in found.items():
        n, won = len(table), facts["better_than_shift"]
        for measure in MEASURES:
            if facts["coverage_90"]:
                inside.append(covered(table, measure))
                made.append(_share(f"believe.coverage_90 {name} {measure}", inside[-1], 0.9))
            value = skill(table, measure)
            made.append(Row(f"believe.skill {name} {measure}", value, "of the variance", 0.0, None, n, None))
        right.append(np.arange(n) < round(facts["verdict_right"] * n))
        majority += [max(won, 1 - won)] * n
        better.append(np.arange(n) < round(won * n))
        made.append(_share(f"believe.verdict_right {name}", right[-1], max(won, 1 - won)))
    first = [_share("believe.coverage_90", np.concatenate(inside), 0.9)] if inside else []
    first.append(_share("believe.verdict_right", np.concatenate(right), float(np.mean(majority))))
    first.append(_share("believe.always_pooled", np.concatenate(better), 0.5))
    first.append(_share("believe.always_shift", ~np.concatenate(better), 0.5))
    return first + made


def _share(name: str, inside: np.ndarray, meant: float) -> Row:
    share = float(inside.mean())
    half = 1.96 * float(np.sqrt(share * (1 - share) / len(inside)))
    return Row(name, share, "share", meant, share / meant, len(inside), (share - half, min(share + half, 1.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="finished predict_error stages of method: pooled or flow")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "believe")
    parser.add_argument("--scores", type=Path, help="JSON of perturbation.py")
    parser.add_argument("--only", choices=list(perturbation_screens.STUDIES), action="append", default=[])
    parser.add_argument("--seconds", type=float, default=20.0, help="of the processor, for a VAE")
    parser.add_argument("--steps", type=int, nargs=2, default=[100, 60], metavar=("BASE", "GROUP"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cells", type=int, default=120, help="of a combination")
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.steps, args.folds, args.cells = 3.0, [5, 3], 2, 30
        args.out = args.out.with_name(args.out.name + "_quick")
    torch.set_num_threads(1)
    names = args.only
    found: dict[str, tuple[pd.DataFrame, dict[str, Any]]] = {}
    for name in names:
        found[f"{name}, short trainings"] = read(run(name, args))
    for folder in args.folders:
        found[folder.parent.parent.name] = read(folder)
    for name, results in (json.loads(args.scores.read_text())["found"] if args.scores else {}).items():
        found[name] = of_scores(perturbation_screens.read(args.data, name), results)
        print(name, json.dumps(found[name][1]), flush=True)
    tables = {name: table.to_dict("records") for name, (table, _) in found.items()}
    report(rows(found), args.json, seconds=args.seconds, steps=args.steps, seeds=args.seeds, found=tables)


if __name__ == "__main__":
    main()
