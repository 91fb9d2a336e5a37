"""Sets of real cells for `vae_convergence.py` and `flow_convergence.py`: training and held-out
cells, with a class each.

Settings are chosen on some of the sets and tested on the others.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import perturbation_screens
import scipy.sparse as sp
import torch
from harness import Row, report
from transfer_cells import Cells
from transfer_lines import vocabulary_of

from scldm.data.vocabulary import Vocabulary
from scldm.random import generator

SPLIT = 11  # stream of randomness
N_GENES, MOST_HELD_OUT, MIN_COUNTS = 2_000, 800, 50
CHOSEN_ON, TESTED_ON = ("pbmc3k", "gbm"), ("worm", "airway")
BASE = "today"
Wanted = Sequence[tuple[str, float]]  # variants and seconds
Keep = Callable[..., None]  # (variant, seconds, scores, **facts)
HIGHER = ("recall", "gene_pearson")  # scores that are better if they are higher
FILES = {
    "pbmc3k": ("pbmc3k_full.h5ad", ("cell_type",)),
    "worm": ("worm_embryo_neurons.h5ad", ("cell_type", "time_point")),
    "gbm": ("perturbation/gbm_panobinostat_lemur.h5ad", ("patient_id", "condition")),
    "airway": ("perturbation/pig_airway_cftr.h5ad", ("cell_type", "genotype")),
    "papalexi": ("perturbation/papalexi_eccite_lowmoi.h5ad", ("bio_rep", "target_gene")),
    "jurkat": ("perturbation/datlinger2021_jurkat_tcr_cropseq.h5ad", ("target_gene", "stimulation")),
}
NAMES = (*FILES, "screen")  # the last is synthetic, see `perturbation_screens.py`


def read(folder: Path, name: str, seed: int) -> tuple[Cells, Cells, Vocabulary]:
    """Return training cells, held-out cells and their vocabulary; the seed splits them."""
    if name == "screen":
        made = perturbation_screens.synthetic(folder)
        names, counts = np.array(made.genes), made.screen.counts
        classes = np.array([f"{c} + {t}" for c, t in zip(made.screen.context, made.screen.treatment, strict=True)])
    else:
        file, labels = FILES[name]
        data = anndata.read_h5ad(folder / file)
        names, counts = data.var_names.to_numpy().astype(str), sp.csr_matrix(data.X, dtype=np.float32)
        classes = data.obs[list(labels)].astype(str).agg(" + ".join, axis=1).to_numpy().astype(str)
    kept = np.flatnonzero(np.asarray(counts.sum(1)).ravel() >= MIN_COUNTS)
    counts, classes = counts[kept], classes[kept]
    variance = np.asarray(counts.power(2).mean(0) - np.square(counts.mean(0))).ravel()
    genes = np.sort(np.argsort(-variance, kind="stable")[:N_GENES])
    counts = counts[:, genes]
    order = torch.randperm(len(classes), generator=generator(seed, SPLIT)).numpy()
    n_held_out = min(MOST_HELD_OUT, len(order) // 4)
    held_out, train = (Cells(counts[rows], classes[rows]) for rows in (order[:n_held_out], order[n_held_out:]))
    return train, held_out, vocabulary_of(tuple(map(str, names[genes])), set(classes.tolist()))


def results(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results, one for each training."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def command_line(doc: str | None, root: Path, name: str, variants: Sequence[str]) -> argparse.ArgumentParser:
    """Return the arguments that both benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=root / "runs" / name)
    parser.add_argument("--only", choices=list(FILES), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(variants), default=list(variants))
    parser.add_argument("--json", type=Path)
    return parser


def run_all(args: argparse.Namespace, run: Callable[[str, int, Wanted, Keep], None]) -> None:
    """Run what is not there yet for every seed and set, then report all that is.

    Args:
        args: See `command_line`; `seconds` are the budgets.
        run: Takes a set, a seed, the variants and seconds that are wanted, and what keeps the scores of one training.
    """
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    for seed in range(args.seeds):
        for name in args.only or FILES:
            done = {(r["variant"], r["seconds"]) for r in results(file) if (r["set"], r["seed"]) == (name, seed)}
            wanted = [(v, s) for v in args.variants for s in args.seconds if (v, s) not in done]
            if wanted:
                run(name, seed, wanted, _keeper(file, name, seed, done))
    found = results(file)
    print(table(found))
    report(rows(found), args.json, found=found)


def _keeper(file: Path, name: str, seed: int, done: Collection[tuple[str, float]]) -> Keep:
    def keep(variant: str, seconds: float, scores: dict[str, float], **facts: Any) -> None:
        if (variant, seconds) in done:
            return
        line = {"set": name, "seed": seed, "variant": variant, "seconds": seconds, "scores": scores, **facts}
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in scores.items())
        print(f"{name} {seed} {variant} {seconds:g} s: {shown}  {facts}", flush=True)

    return keep


def rows(found: Sequence[dict[str, Any]]) -> list[Row]:
    """Return each score of each variant beside today's, by set and seconds; ratios above 1 are better."""
    made = []
    for name, seconds in sorted({(r["set"], r["seconds"]) for r in found if r["seconds"]}):
        here = [r for r in found if (r["set"], r["seconds"]) == (name, seconds)]
        today = {r["seed"]: r["scores"] for r in here if r["variant"] == BASE}
        for variant in dict.fromkeys(r["variant"] for r in here if r["variant"] != BASE):
            own = {r["seed"]: r["scores"] for r in here if r["variant"] == variant and r["seed"] in today}
            for score in [x for x in next(iter(own.values()), {}) if all(x in of for of in today.values())]:
                pairs = [(own[seed][score], today[seed][score]) for seed in own]
                ratios = [a / b if score in HIGHER else b / a for a, b in pairs if min(a, b) > 0]
                ours, theirs = (float(np.mean(side)) for side in zip(*pairs, strict=True))
                whole = len(ratios) == len(pairs)
                made.append(
                    Row(f"{name}.{seconds:g}s.{variant}.{score}".replace(" ", "_"), ours, score, theirs,
                        float(np.median(ratios)) if whole else None, len(pairs),
                        (min(ratios), max(ratios)) if whole else None)
                )  # fmt: skip
    return made


def table(found: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, a line for each set, number of seconds and variant."""
    scores = list(dict.fromkeys(x for r in found if r["seconds"] for x in r["scores"]))
    lines = [
        f"| set | s | variant | steps | {' | '.join(scores)} | n |",
        f"|---|---|---|---|{'---|' * len(scores)}---|",
    ]
    for name, seconds, variant in dict.fromkeys((r["set"], r["seconds"], r["variant"]) for r in found):
        here = [r for r in found if (r["set"], r["seconds"], r["variant"]) == (name, seconds, variant)]
        steps = f"{np.mean([r['steps'] for r in here]):.0f}" if "steps" in here[0] else "–"
        means = [f"{np.mean([r['scores'][x] for r in here]):.4g}" if x in here[0]["scores"] else "–" for x in scores]
        lines.append(f"| {name} | {seconds:g} | {variant} | {steps} | {' | '.join(means)} | {len(here)} |")
    return "\n".join(lines)
