"""The whole line on every usable file of the corpus: validate-data, init, ingest, three steps of training, generation.

    PYTHONPATH=.:tests python benchmarks/corpus.py --json corpus.json        # about seven minutes on one core
    PYTHONPATH=.:tests python benchmarks/corpus.py --only 'soma|files:'      # cases by a part of their names

The corpus is made by `tests/helpers/files/corpus`. Everything runs in this process: the stages and the training worker
are those of a job, without Ray's start for each case. Counted as differences are other cells, genes, classes or counts
than another part reads, or anndata, scanpy and tiledbsoma; another verdict; and a usable case that does not come to its
generated cells. The exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch.distributed as dist
from harness import machine
from helpers.files.corpus import CASES
from helpers.files.corpus.answers import Answers, ask_all, differences
from helpers.files.corpus.case import CorpusCase
from helpers.stages.generation_case import generate
from helpers.training.small_job import spec_of

from pipeline.config.job import TrainFlowConfig
from pipeline.core.manifest import Manifest
from pipeline.training.tasks.spec import FlowWorkerSpec, VaeWorkerSpec
from pipeline.training.worker import train_worker

STEPS, PER_CLASS = 3, 2
TRAIN: dict[str, Any] = {
    "max_steps": STEPS, "checkpoint_every": STEPS, "validate_every": STEPS, "validation_cells": 8, "keep_last": 1,
    "keep_best": 0, "feed": {"batch_size": 8, "micro_batch_size": 8, "lanes": 1},
}  # fmt: skip
FLOW = {"d_model": 16, "n_layers": 1, "n_heads": 2}


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    name: str
    expected: str  # usable or refused
    validated: str  # likewise, by validate-data
    ingested: str
    generated: int | None  # cells; None: the case is not usable
    seconds: float
    differences: tuple[str, ...]


def run_case(case: CorpusCase, folder: Path) -> Outcome:
    """Run the line on a case; what it raises is a difference, too."""
    began = time.perf_counter()
    for name in ("given", "made", "again"):
        (folder / name).mkdir()
    answers = ask_all(case.written(folder / "given"), folder / "made")
    found, generated = differences(answers, folder / "again"), None
    if isinstance(answers.ingested, Manifest):
        try:
            generated, problems = to_its_end(answers, answers.ingested, folder)
            found += problems
        except Exception as error:  # any: the other cases go on
            found.append(f"{type(error).__name__}: {error}")
    words = ("refused", "usable")
    verdicts = [words[x] for x in (answers.expected, not answers.errors, isinstance(answers.ingested, Manifest))]
    return Outcome(case.name, *verdicts, generated, round(time.perf_counter() - began, 2), tuple(found))


def to_its_end(answers: Answers, ingested: Manifest, folder: Path) -> tuple[int, list[str]]:
    """Train both networks on what was ingested, and generate some cells of each class.

    Returns:
        The number of generated cells, and what is wrong with them.
    """
    given = spec_of(folder / "vae", ingested, **TRAIN, genes_per_step=None, theta_cells=16)
    inputs = {"ingest": ingested}
    inputs["train_vae"] = trained(VaeWorkerSpec.model_validate(given))
    inputs["train_flow"] = trained(_flow_spec(folder / "flow", inputs))
    labels = answers.written.case.labels
    classes = ingested.facts["label_counts"]
    wanted: dict[str, Any] = {"per_label": {labels[0]: PER_CLASS}} if labels else {"n_cells": PER_CLASS}
    facts = generate(folder / "cells", inputs, **wanted, sampler={"steps": 2})
    cells = anndata.concat([anndata.read_h5ad(folder / "cells" / s["file"]) for s in facts["shards"]])
    found = []
    if cells.n_vars != ingested.facts["n_genes"]:
        found.append(f"generation: {cells.n_vars} genes of {ingested.facts['n_genes']}")
    made = Counter(map(str, cells.obs[labels[0]].tolist())) if labels else Counter()
    if labels and (len(made), set(made.values())) != (len(classes[labels[0]]), {PER_CLASS}):
        found.append(f"generation: {dict(made)} for {PER_CLASS} cells of each of {sorted(classes[labels[0]])}")
    if not np.isfinite(cells.X.data if hasattr(cells.X, "data") else cells.X).all():
        found.append("generation: counts that are not finite")
    return cells.n_obs, found


def trained(spec: VaeWorkerSpec | FlowWorkerSpec) -> Manifest:
    spec.folder.mkdir()
    facts = train_worker(spec)
    return Manifest(f"train_{spec.kind}", "v", str(spec.folder), {}, {}, facts, 0.0, 0.0)


def _flow_spec(folder: Path, inputs: dict[str, Manifest]) -> FlowWorkerSpec:
    """Return the specification of a flow that is trained together with the VAE, which needs no cached latents."""
    config = TrainFlowConfig.model_validate({"model": FLOW, "train": TRAIN, "vae": {"train": True}})
    return FlowWorkerSpec(
        config=config, inputs=inputs, folder=folder, version="v", seed=0, feed_engine="local", tracker={}
    )


def start_process_group() -> None:
    """Start a group of this process alone, as a worker of a job has it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    dist.init_process_group("gloo")


def outcomes(cases: list[CorpusCase]) -> Iterator[Outcome]:
    """Run the cases, one after the other."""
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="corpus-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield run_case(case, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose names hold it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    given = parser.parse_args()
    start_process_group()
    done = []
    print("| case | expected | validate-data | ingest | generated | s | differences |")
    print("|---|---|---|---|---|---|---|")
    for o in outcomes([case for case in CASES if re.search(given.only, case.name)]):
        done.append(o)
        cells = "" if o.generated is None else o.generated
        said = "; ".join(o.differences).replace("\n", " ").replace("|", "\\|") or "0"
        print(
            f"| {o.name!r} | {o.expected} | {o.validated} | {o.ingested} | {cells} | {o.seconds} | {said} |", flush=True
        )
    wrong, seconds = sum(len(o.differences) for o in done), sum(o.seconds for o in done)
    usable = sum(o.expected == "usable" for o in done)
    print(f"\n{len(done)} cases, {usable} of them usable: {wrong} differences, {seconds:.0f} s")
    if given.json is not None:
        document = {"machine": machine(), "cases": len(done), "usable": usable, "differences": wrong}
        given.json.write_text(json.dumps({**document, "outcomes": [asdict(o) for o in done]}, indent=1) + "\n")
    dist.destroy_process_group()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
