r"""Does the encoder gain from knowing the counts? Our count-aware pooling against upstream's inputs, all else equal.

Same cells, split, genes, size, steps, optimizer, batch order and starting weights; pads masked and a bias per gene for
all, so that only the way a count enters the encoder differs. Each input trains with the learning rate that gave it the
lower negative log-likelihood of validation cells at the first seed; held-out cells have no part in that choice.

    python benchmarks/count_aware.py pbmc3k_full.h5ad worm_embryo_neurons.h5ad \
        --json benchmarks/results/count_aware.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from harness import machine
from train_small import Parts, Training, read_counts, score, split_counts, train

from scldm.nn.config import VAEConfig
from scldm.optim.config import OptimizerConfig

OURS = "count_aware"


@dataclass(frozen=True)
class Plan:
    """Sizes of the comparison."""

    inputs: Sequence[str] = (OURS, "log1p", "projconcat")
    learning_rates: Sequence[float] = (1e-3, 3e-3)
    seeds: Sequence[int] = (0, 1, 2)
    split_seed: int = 0
    n_genes: int = 2000
    steps: int = 600
    batch_size: int = 16
    d_model: int = 32
    n_layers: int = 2
    n_latent_tokens: int = 16


QUICK = Plan(inputs=(OURS, "log1p"), learning_rates=(3e-3,), seeds=(0, 1), n_genes=200, steps=20)


@dataclass(frozen=True)
class Run:
    """One trained model. Likelihoods in nats per cell, summed over genes; correlations averaged over genes."""

    data: str
    input: str
    lr: float
    seed: int
    validation_nll: float
    nll: float
    gene_pearson: float
    train_seconds: float
    of_cells: np.ndarray  # nll of each held-out cell

    def row(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "of_cells"}


@dataclass(frozen=True)
class Summary:
    """One input on one data set: (mean, standard deviation) over seeds.

    `more_nll` and `more_pearson` are the input's minus ours, seed by seed; `cell_error` is the standard error of
    `more_nll` over held-out cells.
    """

    data: str
    input: str
    lr: float
    nll: tuple[float, float]
    gene_pearson: tuple[float, float]
    more_nll: tuple[float, float]
    more_pearson: tuple[float, float]
    cell_error: float


def train_and_score(data: str, parts: Parts, plan: Plan, *, kind: str, lr: float, seed: int) -> Run:
    config = VAEConfig.model_validate(
        {"input": kind, "d_model": plan.d_model, "n_layers": plan.n_layers, "n_latent_tokens": plan.n_latent_tokens}
    )
    start = time.perf_counter()
    vae = train(config, parts.train, Training(plan.steps, plan.batch_size, OptimizerConfig(lr=lr)), seed)
    seconds = time.perf_counter() - start
    validation, held_out = score(vae, parts.validation), score(vae, parts.held_out)
    run = Run(
        data, kind, lr, seed, float(validation.nll.mean()), float(held_out.nll.mean()), held_out.gene_pearson,
        seconds, held_out.nll,
    )  # fmt: skip
    print(json.dumps(run.row()), file=sys.stderr, flush=True)
    return run


def compare(data: str, parts: Parts, plan: Plan) -> tuple[list[Run], list[Run]]:
    """Runs at the chosen learning rates, and those that lost the choice."""
    kept, lost = [], []
    first, *others = plan.seeds
    for kind in plan.inputs:
        tried = [train_and_score(data, parts, plan, kind=kind, lr=lr, seed=first) for lr in plan.learning_rates]
        best = min(tried, key=lambda run: run.validation_nll)
        kept.append(best)
        lost += [run for run in tried if run is not best]
        kept += [train_and_score(data, parts, plan, kind=kind, lr=best.lr, seed=seed) for seed in others]
    return kept, lost


def summarise(runs: Sequence[Run]) -> list[Summary]:
    out = []
    for data, kind in dict.fromkeys((run.data, run.input) for run in runs):
        theirs, ours = ([r for r in runs if (r.data, r.input) == (data, name)] for name in (kind, OURS))
        pairs = list(zip(theirs, ours, strict=True))
        by_cell = np.mean([a.of_cells - b.of_cells for a, b in pairs], axis=0)
        out.append(
            Summary(
                data, kind, theirs[0].lr,
                nll=spread([a.nll for a in theirs]),
                gene_pearson=spread([a.gene_pearson for a in theirs]),
                more_nll=spread([a.nll - b.nll for a, b in pairs]),
                more_pearson=spread([a.gene_pearson - b.gene_pearson for a, b in pairs]),
                cell_error=float(by_cell.std(ddof=1) / len(by_cell) ** 0.5),
            )
        )  # fmt: skip
    return out


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def table(summaries: Sequence[Summary]) -> str:
    """Markdown."""
    lines = [
        "| data | input | learning rate | held-out NLL | more than ours | per-gene Pearson | more than ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in summaries:
        more_nll = more_pearson = "–"
        if s.input != OURS:
            more_nll = f"{s.more_nll[0]:+.2f} ± {s.more_nll[1]:.2f} (cells: {s.cell_error:.2f})"
            more_pearson = f"{s.more_pearson[0]:+.4f} ± {s.more_pearson[1]:.4f}"
        nll, pearson = "{:.2f} ± {:.2f}".format(*s.nll), "{:.4f} ± {:.4f}".format(*s.gene_pearson)
        lines.append(f"| {s.data} | {s.input} | {s.lr:g} | {nll} | {more_nll} | {pearson} | {more_pearson} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="H5AD", help="raw counts in X")
    parser.add_argument("--json", type=Path, help="write the runs here too")
    parser.add_argument("--quick", action="store_true", help="few steps, genes and runs; for a look, not a claim")
    parser.add_argument("--inputs", nargs="+", metavar="INPUT", help=f"what to compare, {OURS} among them")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    plan = QUICK if a.quick else Plan()
    if a.inputs:
        if OURS not in a.inputs:
            parser.error(f"--inputs must hold {OURS}, which the others are compared with")
        plan = replace(plan, inputs=tuple(a.inputs))
    kept: list[Run] = []
    lost: list[Run] = []
    for path in a.files:
        found = compare(path.stem, split_counts(read_counts(path), n_genes=plan.n_genes, seed=plan.split_seed), plan)
        kept += found[0]
        lost += found[1]
    summaries = summarise(kept)
    document = {
        "machine": machine(),
        "command": shlex.join(["python", *sys.argv]),
        "plan": asdict(plan),
        "rows": [run.row() for run in kept],
        "other_learning_rates": [run.row() for run in lost],
        "summary": [asdict(s) for s in summaries],
    }
    print(table(summaries))
    if a.json is not None:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
