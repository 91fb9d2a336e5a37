"""Numbers to believe: our cells beside real ones, simple baselines and scVI, on real data, within a fixed budget.

For each file the whole line runs as `scldm run` runs it (one process, two workers), with the settings below. scVI is
trained on the same training cells for as many seconds as train_vae, encode and train_flow took together, Ray's start
included, and is asked for the same labels in three ways (`scvi_side.py`). All candidates are scored by the code of
`evaluate` against held-out cells that nobody trained on, beside the real-vs-real floor.

    make quality                      # both files, with scVI in .venv-scvi; meant for 45 minutes on 2 cores
    python benchmarks/quality.py --only pbmc3k --no-scvi --scale 0.1      # does it run at all
    python benchmarks/quality.py --only worm --no-scvi --set train_flow.train.max_steps=600
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from harness import report
from quality_table import Judged, as_rows, judge, print_table

from pipeline.config.job import EvaluateConfig
from pipeline.core.manifest import Manifest, newest_manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.report.evaluation import evaluate
from pipeline.stages.evaluate import decode_cells, open_generated, read_generated
from scldm.checkpoints.native import load_vae

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SCVI_WAYS = ("prior", "per label", "posterior")
TRAINED = ("train_vae", "encode", "train_flow")  # stages whose seconds are scVI's budget


@dataclass(frozen=True)
class Dataset:
    """A file, its labels, and the steps of the two trainings."""

    file: str
    labels: tuple[str, ...]
    vae_steps: int
    flow_steps: int
    settings: dict[str, Any] = field(default_factory=dict)


DATASETS = {
    "pbmc3k": Dataset("pbmc3k_full.h5ad", ("cell_type",), 1400, 1800),
    "worm": Dataset("worm_embryo_neurons.h5ad", ("cell_type", "time_point"), 1000, 1500),
}
COMMON = {
    "ingest.genes": "{min_cells: 10}",
    "ingest.split": "{validation: 0.05, test: 0.25}",
    "generate.like": "test",
    "evaluate.umap": "false",
}


def run_line(name: str, data: Dataset, out: Path, scale: float, given: list[str]) -> dict[str, Manifest]:
    """The line through the command line, and the manifests that it leaves."""
    settings = {
        "name": name, "output": str(out), "ingest.source": f"{{type: h5ad, path: {DATA / data.file}}}",
        "ingest.labels": f"[{', '.join(data.labels)}]",
        "train_vae.train.max_steps": max(20, int(scale * data.vae_steps)),
        "train_flow.train.max_steps": max(20, int(scale * data.flow_steps)),
        **COMMON, **data.settings,
    }  # fmt: skip
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "jobs" / "demo_h5ad.yaml")]
    subprocess.run([*command, *(f"{k}={v}" for k, v in settings.items()), *given], check=True, cwd=ROOT)
    return newest(name, out)


def newest(name: str, out: Path) -> dict[str, Manifest]:
    """The manifests of the newest stages of a line."""
    stages = ("ingest", *TRAINED, "generate", "evaluate")
    return {stage: newest_manifest(out / name, stage) for stage in stages}


def scvi_cells(python: Path, made: dict[str, Manifest], labels: tuple[str, ...], out: Path) -> dict[str, Any]:
    """What scVI makes of the same training cells and labels in the same time: candidates by name, and facts."""
    ingested = IngestedDataset.open(made["ingest"])
    folder = out / "scvi"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {split: ingested.anndata(split) for split in ("train", "validation")}  # scVI stops by the second
    known = anndata.concat(parts, label="split", index_unique="-", merge="same")
    known.write_h5ad(folder / "train.h5ad")
    ingested.anndata("test").obs[list(labels)].to_csv(folder / "asked.csv", index=False)
    seconds = sum(made[stage].seconds for stage in TRAINED)
    command = [python, ROOT / "benchmarks" / "scvi_side.py", folder / "train.h5ad", folder / "asked.csv", folder]
    subprocess.run([*map(str, command), "--label", *labels, "--seconds", f"{seconds:.0f}"], check=True)
    found = {f"scVI {x}": anndata.read_h5ad(folder / f"{x}.h5ad") for x in SCVI_WAYS}
    return {"cells": found, "facts": json.loads((folder / "facts.json").read_text())}


def score(made: dict[str, Manifest], labels: tuple[str, ...], extra: dict[str, anndata.AnnData]) -> Any:
    """The evaluation that the stage makes, with scVI's cells as further candidates."""
    config = EvaluateConfig(umap=False)
    ingested = IngestedDataset.open(made["ingest"])
    held_out = ingested.anndata("test", max_cells=config.max_cells, seed=config.seed)
    training = ingested.anndata("train")
    rng = np.random.default_rng(config.seed)
    cells = open_generated(made["generate"], held_out.var_names)
    generated = read_generated(cells, max_cells=config.max_cells, rng=rng)
    decoded = decode_cells(load_vae(made["train_vae"].path("model")), held_out, n_cells=config.reconstruction_cells)
    return evaluate(
        held_out=held_out, training=training, generated=generated, labels=labels, config=config, decoded=decoded,
        extra=extra,
    )  # fmt: skip


def one(name: str, data: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    began = time.time()
    made = newest(name, args.out) if args.again else run_line(name, data, args.out, args.scale, args.set)
    peer: dict[str, Any] = {"cells": {}, "facts": {"absent": "--no-scvi"}}
    if not args.no_scvi:
        peer = scvi_cells(args.scvi_python, made, data.labels, args.out / name)
    result = score(made, data.labels, peer["cells"])
    judged: list[Judged] = judge(result, data.labels)
    print_table(name, result, judged)
    return {
        "seconds": {stage: round(m.seconds, 1) for stage, m in made.items()},
        "all_seconds": round(time.time() - began, 1),
        "scvi": peer["facts"],
        "goals": [j.as_json() for j in judged],
        "rows": {row.name: candidates(row) for row in result.rows},
    }  # fmt: skip


def candidates(row: Any) -> dict[str, dict[str, float | None]]:
    """Value and half of the 95 % interval of everyone who has this score."""
    named = {"ours": row.score, **({"floor": row.floor} if row.floor else {}), **row.baselines}
    return {name: {"value": s.value, "half_width": s.half_width} for name, s in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--only", choices=list(DATASETS), action="append")
    parser.add_argument("--no-scvi", action="store_true")
    parser.add_argument("--scvi-python", type=Path, default=ROOT / ".venv-scvi" / "bin" / "python")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the job; may be repeated")
    parser.add_argument("--again", action="store_true", help="score what lies in --out; nothing of ours is trained")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.no_scvi and not args.scvi_python.exists():
        parser.error(f"{args.scvi_python} is not there: `make quality` makes it, or give --scvi-python or --no-scvi")
    if absent := [d.file for n, d in DATASETS.items() if n in (args.only or DATASETS) and not (DATA / d.file).exists()]:
        parser.error(f"{DATA} lacks {', '.join(absent)}: real cells, which are not part of the repository")
    found = {name: one(name, DATASETS[name], args) for name in args.only or DATASETS}
    report(as_rows(found), args.json, found=found)


if __name__ == "__main__":
    main()
