"""Quality per second: our two trainings in a number of seconds, beside scVI in the same seconds and simple answers.

For every set (real ones of `convergence_sets.py`, a synthetic one), split and budget, half of the seconds go to a VAE
and half to a flow, with the settings that the jobs for CPUs have; scVI (`scvi_side.py`) gets all of them. Seconds are
of one thread; nothing of Ray's start is in them. All are asked for cells with the labels of the held-out ones and are
scored by the code of `evaluate`. A score's distance is that from the floor, real cells against real cells, but not
less than half of the wider interval of the two that are compared. The summary of a budget is the mean over sets,
splits and scores of the logarithm of how many times farther from the floor a rival is than ours, and the share of the
scores that can be told apart in which ours is nearer.

    python benchmarks/quality_budget.py --minutes 2 --json benchmarks/results/quality_budget.json
    python benchmarks/quality_budget.py --minutes 0.2 --only gbm --splits 1 --no-scvi      # does it run at all

What is there is not made again: results lie in --out, and a run that was stopped goes on.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import convergence_sets
import flow_convergence
import numpy as np
import pandas as pd
import torch
import vae_convergence
from harness import Row, report
from transfer import generate
from transfer_cells import Cells
from transfer_lines import LABEL, Pair, encode, sizes_of

from pipeline.config.job import EvaluateConfig
from pipeline.report.evaluation import evaluate
from pipeline.report.rows import MetricRow
from pipeline.report.verdict import JUDGED
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.vocabulary import Vocabulary
from scldm.flow.config import PathConfig

ROOT = Path(__file__).resolve().parents[1]
VAE = "components, rate 2e-3"
FLOW = "batch 64"
NB = "per-label NB"
SCVI_WAYS = ("prior", "per label", "posterior")
RIVALS = (NB, "scVI prior", "scVI per label")


def ours(cells: Cells, vocabulary: Vocabulary, *, seconds: float, seed: int) -> Pair:
    """Train the pair in the seconds."""
    vae, n_vae = vae_convergence.train(vae_convergence.VARIANTS[VAE], cells, seconds=seconds / 2, seed=seed)
    loaded = LoadedVAE(vae, vocabulary, sizes_of(cells))
    variant = flow_convergence.VARIANTS[FLOW]
    z = encode(loaded, cells)
    trained = flow_convergence.train_flow(cells.classes, z, vocabulary, variant, seconds=seconds / 2, seed=seed)
    dit, n_flow = trained[:2]
    m, e = z.shape[1:]
    return Pair(loaded, LoadedFlow(dit, PathConfig(), vocabulary, loaded.library_sizes, m, e), (n_vae, n_flow))


def scvi(cells: Cells, held_out: Cells, args: argparse.Namespace, folder: Path, seed: int) -> dict[str, Cells]:
    """Train scVI in the seconds, and return what it makes in each of its ways."""
    folder.mkdir(parents=True, exist_ok=True)
    training = as_anndata(cells)
    training.obs["split"] = np.where(np.arange(len(cells)) % 20 == 0, "validation", "train")
    training.write_h5ad(folder / "train.h5ad")
    pd.DataFrame({LABEL: held_out.classes}).to_csv(folder / "asked.csv", index=False)
    files = [folder / "train.h5ad", folder / "asked.csv", folder]
    command = [args.scvi_python, ROOT / "benchmarks" / "scvi_side.py", *files]
    options = ["--label", LABEL, "--seconds", f"{60 * args.minutes:.0f}", "--threads", "1", "--seed", str(seed)]
    subprocess.run([*map(str, command), *options], check=True, capture_output=True)
    made = {f"scVI {way}": anndata.read_h5ad(folder / f"{way}.h5ad") for way in SCVI_WAYS}
    return {name: Cells(data.X.tocsr(), data.obs[LABEL].astype(str).to_numpy()) for name, data in made.items()}


def as_anndata(cells: Cells) -> anndata.AnnData:
    n, g = cells.counts.shape
    names = [f"gene{i}" for i in range(g)]
    obs = pd.DataFrame({LABEL: pd.Categorical(cells.classes)}, index=[f"cell{i}" for i in range(n)])
    return anndata.AnnData(cells.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=names))


def score(cells: Cells, held_out: Cells, made: Cells, rivals: dict[str, Cells], seed: int) -> list[MetricRow]:
    config = EvaluateConfig(umap=False, seed=seed)
    extra = {name: as_anndata(of) for name, of in rivals.items()}
    found = evaluate(
        held_out=as_anndata(held_out), training=as_anndata(cells), generated=as_anndata(made), labels=(LABEL,),
        config=config, extra=extra,
    )  # fmt: skip
    rows = [row for row in found.rows if row.score.group in (*JUDGED, "label")]
    return [row for row in rows if row.floor is not None and row.score.replicates is not None]


def kept(row: MetricRow) -> dict[str, list[float]]:
    """Return value and half of the interval of ours, the floor and the rivals."""
    assert row.floor is not None
    everyone = {"ours": row.score, "floor": row.floor, **{k: v for k, v in row.baselines.items() if k in RIVALS}}
    return {name: [of.value, of.half_width or 0.0] for name, of in everyone.items()}


def log_ratio(scores: dict[str, list[float]], rival: str) -> float:
    """Return the logarithm of how many times farther from the floor a rival is than ours."""
    least = max(scores["ours"][1], scores[rival][1], 1e-9)
    ours, theirs = (max(abs(scores[who][0] - scores["floor"][0]), least) for who in ("ours", rival))
    return math.log(theirs / ours)


def run(name: str, split: int, args: argparse.Namespace) -> None:
    file = args.out / "results.jsonl"
    key = {"set": name, "split": split, "minutes": args.minutes, "scvi": not args.no_scvi}
    if any(key.items() <= found.items() for found in convergence_sets.results(file)):
        return
    cells, held_out, vocabulary = convergence_sets.read(args.data, name, split)
    pair = ours(cells, vocabulary, seconds=60 * args.minutes, seed=split)
    made = generate(pair, held_out.classes, split)
    folder = args.out / f"{name} {args.minutes:g} min split {split}"
    rivals = {} if args.no_scvi else scvi(cells, held_out, args, folder, split)
    rows = score(cells, held_out, made, rivals, split)
    line = key | {
        "steps": pair.steps,
        "scores": {row.name: kept(row) for row in rows},
        "judged": {row.name: {rival: row.against(rival) for rival in RIVALS if rival in row.baselines} for row in rows},
    }
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")
    for row in as_rows([line]):
        print(f"{name} {split}: {row.name} {row.value:.3f} ({row.n})", flush=True)


def as_rows(found: Sequence[dict[str, Any]]) -> list[Row]:
    """Return the summary of each budget: how many times farther a rival is, and the share of scores that ours wins."""
    made = []
    for minutes in sorted({r["minutes"] for r in found}):
        here = [r for r in found if r["minutes"] == minutes]
        for rival in RIVALS:
            each = [[log_ratio(scores, rival) for scores in r["scores"].values() if rival in scores] for r in here]
            each = [logs for logs in each if logs]
            if not each:
                continue
            means = [math.exp(np.mean(logs)) for logs in each]
            told = Counter(j[rival] for r in here for j in r["judged"].values() if rival in j)
            n, label = told["nearer"] + told["farther"], rival.replace(" ", "_")
            times = math.exp(np.mean(np.concatenate(each)))
            made.append(Row(f"{minutes:g}min.distance_vs_{label}", times, "times nearer", 1.0, times, len(means),
                            (min(means), max(means))))  # fmt: skip
            if n:
                share = told["nearer"] / n
                made.append(Row(f"{minutes:g}min.win_share_vs_{label}", share, "of scores told apart", 0.5, share / 0.5,
                                n, None))  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality_budget")
    parser.add_argument("--only", choices=list(convergence_sets.NAMES), action="append")
    parser.add_argument("--minutes", type=float, default=2, help="of one thread, for both trainings together")
    parser.add_argument("--splits", type=int, default=2, help="each with a seed of its own")
    parser.add_argument("--no-scvi", action="store_true")
    parser.add_argument("--scvi-python", type=Path, default=ROOT / ".venv-scvi" / "bin" / "python")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.no_scvi and not args.scvi_python.exists():
        parser.error(f"{args.scvi_python} is not there: `make quality` makes it, or give --scvi-python or --no-scvi")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in range(args.splits):
        for name in args.only or convergence_sets.NAMES:
            run(name, split, args)
    found = convergence_sets.results(args.out / "results.jsonl")
    report(as_rows(found), args.json, found=found)


if __name__ == "__main__":
    main()
