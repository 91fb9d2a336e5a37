"""Query mapping: labels of reference cells for query cells, beside scANVI and classifiers on principal components.

`Model.map` (logistic regression on latents, temperature from cells that were left out) by a VAE that was trained on the
reference, against scANVI (`label_transfer_scanvi_side.py`, in an environment of its own) with as many seconds of one
thread, k nearest neighbours in 30 components of log1p CP10k, and logistic regression in 50. Nobody sees a query cell
before it is asked for. Settings of `map` were chosen on pbmc3k, split `random 0`; other splits and sets are tests.

Splits: a quarter of the cells by seed; of worm also the cells of one laboratory (batches Murray_*), where the reference
is the other's. `without X`: the reference lacks type X, and the query's cells of X should be told from the others:
AUROC of novelty, or of 1 - the largest probability.

    make .venv-scvi/.installed
    python benchmarks/label_transfer.py --json benchmarks/results/label_transfer.json

What is there is not made again: results lie in --out.

Shape letters: n cells, g genes, k classes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from harness import Row, report
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from transfer_cells import Cells
from transfer_lines import batch_of, chunks, train_vae, vocabulary_of

from scldm.api.analysis.mapping import LabelTransfer, Novelty, calibration_error

ROOT = Path(__file__).resolve().parents[1]
SIDE = Path(__file__).with_name("label_transfer_scanvi_side.py")
FILES = {"pbmc3k": "pbmc3k_full.h5ad", "worm": "worm_embryo_neurons.h5ad"}
LABEL, LEAST = "cell_type", 1e-3  # smaller probabilities count as this in the log-likelihood
PIECES = (
    ("pbmc3k", "random 1", None), ("pbmc3k", "random 2", None), ("worm", "random 1", None), ("worm", "Murray", None),
    ("pbmc3k", "random 1", "FCGR3A+ Mono"), ("worm", "random 1", "AWC"), ("worm", "random 1", "ASG"),
)  # fmt: skip
OURS = "map"
SCORES = ("accuracy", "balanced", "ece", "nll", "brier")


@dataclass(frozen=True)
class Piece:
    reference: Cells
    query: Cells
    genes: tuple[str, ...]


def read(folder: Path, name: str, split: str, without: str | None) -> Piece:
    """Reference and query of a split; 2,000 genes of the largest variance in the reference."""
    data = anndata.read_h5ad(folder / FILES[name])
    counts, classes = sp.csr_matrix(data.X, dtype=np.float32), data.obs[LABEL].astype(str).to_numpy()
    if split.startswith("random"):
        order = np.random.default_rng(int(split.split()[1])).permutation(len(classes))
        asked = np.isin(np.arange(len(classes)), order[: len(order) // 4])
    else:
        asked = data.obs["batch"].astype(str).str.startswith(split).to_numpy()
    known = np.flatnonzero(~asked & (classes != without))
    mixed = np.random.default_rng(0).permutation(known)  # the first ones are the VAE's validation
    of_reference = counts[mixed]
    variance = np.asarray(of_reference.power(2).mean(0) - np.square(of_reference.mean(0))).ravel()
    genes = np.sort(np.argsort(-variance, kind="stable")[:2_000])
    query = np.flatnonzero(asked & (np.asarray(counts[:, genes].sum(1)).ravel() > 0))
    cells = Cells(counts[:, genes], classes)
    return Piece(cells[mixed], cells[query], tuple(map(str, data.var_names[genes])))


# ---- the ways: probabilities (n, k) of the query in the order of the classes, and novelty of each cell (n,) ----------
Answer = tuple[np.ndarray, np.ndarray]


def mapped(piece: Piece, classes: np.ndarray, seconds: float) -> tuple[dict[str, Answer], dict[str, Any]]:
    """`Model.map` and the same without a temperature."""
    vocabulary = vocabulary_of(piece.genes, set(classes.tolist()))
    vae, steps = train_vae(
        "scratch", piece.reference, vocabulary, None, replay=None, seconds=seconds, seed=0, components=True
    )
    z, asked = (latents(vae.vae, cells) for cells in (piece.reference, piece.query))
    transfer = LabelTransfer.fit(z, np.searchsorted(classes, piece.reference.classes), seed=0)
    novelty, found = Novelty(z).score(asked), transfer.probabilities(asked)
    plain = found**transfer.temperature
    answers = {OURS: (found, novelty), "map, temperature 1": (plain / plain.sum(1, keepdims=True), novelty)}
    return answers, {"steps": steps, **transfer.about}


@torch.inference_mode()
def latents(vae: torch.nn.Module, cells: Cells) -> np.ndarray:
    return np.concatenate([vae.encode(batch_of(part)).flatten(1).numpy() for part in chunks(cells)])


def on_components(piece: Piece, classes: np.ndarray) -> dict[str, Answer]:
    x, asked = (log_values(cells.counts) for cells in (piece.reference, piece.query))
    ids = np.searchsorted(classes, piece.reference.classes)
    few, many = (PCA(n, random_state=0).fit(x) for n in (30, 50))
    knn = KNeighborsClassifier(15).fit(few.transform(x), ids)
    votes = knn.predict_proba(few.transform(asked))
    far = knn.kneighbors(few.transform(asked))[0].mean(1)
    logistic = LogisticRegression(C=0.1, max_iter=2_000).fit(many.transform(x), ids)
    found = logistic.predict_proba(many.transform(asked))
    return {"kNN on PCA": (votes, far), "logistic on PCA": (found, 1 - found.max(1))}


def log_values(counts: sp.csr_matrix) -> np.ndarray:
    dense = counts.toarray()
    return np.log1p(1e4 * dense / dense.sum(1, keepdims=True))


class Scanvi:
    """scANVI in a process of its own, beside ours: each computes on one thread."""

    def __init__(self, piece: Piece, folder: Path, args: argparse.Namespace):
        folder.mkdir(parents=True, exist_ok=True)
        for name, cells in (("reference", piece.reference), ("query", piece.query)):
            obs = pd.DataFrame({"label": cells.classes}, index=[f"{name}-{i}" for i in range(len(cells))])
            anndata.AnnData(cells.counts, obs=obs, var=pd.DataFrame(index=piece.genes)).write_h5ad(
                folder / f"{name}.h5ad"
            )
        self.folder = folder
        self.process = subprocess.Popen(
            [args.python, str(SIDE), str(folder), "--seconds", str(args.seconds)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def answer(self, classes: np.ndarray) -> tuple[dict[str, Answer], dict[str, Any]]:
        said, _ = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(said[-3_000:])
        found = pd.read_csv(self.folder / "probabilities.csv", index_col=0)[list(classes)].to_numpy()
        return {"scANVI": (found, 1 - found.max(1))}, json.loads((self.folder / "facts.json").read_text())


# ---- scores -------------------------------------------------------------------------------------------------------
def scores(way: str, answer: Answer, piece: Piece, classes: np.ndarray, without: str | None) -> dict[str, float]:
    found, novelty = answer
    truth = piece.query.classes
    if without is not None:
        of_new, flagged = truth == without, novelty > 0.95
        told = {"auroc": float(roc_auc_score(of_new, novelty)), "probability": float(found[of_new].max(1).mean())}
        shares = {"flagged": float(flagged[of_new].mean()), "known_flagged": float(flagged[~of_new].mean())}
        return told | (shares if way.startswith(OURS) else {})  # of the others it is no share of reference cells
    ids = np.searchsorted(classes, truth)
    right = found.argmax(1) == ids
    return {
        "accuracy": float(right.mean()),
        "balanced": float(np.mean([right[ids == k].mean() for k in np.unique(ids)])),
        "ece": calibration_error(found, ids),
        "nll": float(-np.log(np.maximum(found[np.arange(len(ids)), ids], LEAST)).mean()),
        "brier": float(np.square(found - np.eye(len(classes))[ids]).sum(1).mean()),
    }


def run(name: str, split: str, without: str | None, args: argparse.Namespace) -> dict[str, Any]:
    piece = read(args.data, name, split, without)
    classes = np.unique(piece.reference.classes)
    peer = Scanvi(piece, args.out / f"{name}-{split}-{without}".replace(" ", "_"), args)
    own, about = mapped(piece, classes, args.seconds)
    theirs, facts = peer.answer(classes)
    answers = {**own, **theirs, **on_components(piece, classes)}
    return {
        "set": name, "split": split, "without": without, "n_reference": len(piece.reference),
        "n_query": len(piece.query), "map": about, "scanvi": facts,
        "scores": {way: scores(way, answer, piece, classes, without) for way, answer in answers.items()},
    }  # fmt: skip


def rows(found: list[dict[str, Any]]) -> list[Row]:
    """Ours beside each other way; ratios above 1 are better."""
    made = []
    for line in found:
        ours = line["scores"][OURS]
        where = f"{line['set']}.{line['split']}" + (f".without_{line['without']}" if line["without"] else "")
        for way, theirs in line["scores"].items():
            for score in () if way == OURS else ("auroc",) if line["without"] else SCORES:
                higher = score in ("accuracy", "balanced", "auroc")
                ratio = ours[score] / theirs[score] if higher else theirs[score] / ours[score]
                made.append(
                    Row(f"label_transfer.{where}.{score}_vs_{way}".replace(" ", "_"), ours[score], score, theirs[score],
                        ratio, 1, None)
                )  # fmt: skip
    return made


def table(found: list[dict[str, Any]]) -> str:
    """A line for each piece and way."""
    lines = []
    for line in found:
        where = f"{line['set']}, " + (f"without {line['without']}" if line["without"] else line["split"])
        for way, own in line["scores"].items():
            lines.append(f"| {where} | {way} | {' | '.join(f'{v:.3f}' for v in own.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "label_transfer")
    parser.add_argument("--python", default=str(ROOT / ".venv-scvi" / "bin" / "python"), help="with scvi-tools")
    parser.add_argument("--seconds", type=float, default=60, help="of the processor, for a VAE and for scANVI")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of pieces", choices=range(len(PIECES)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file, found = args.out / "results.jsonl", []
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for i in args.only or range(len(PIECES)):
        line = next((d for d in done if (d["set"], d["split"], d["without"]) == PIECES[i]), None)
        if line is None:
            line = run(*PIECES[i], args)
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(table([line]), flush=True)
        found.append(line)
    print(table(found))
    report(rows(found), args.json, seconds=args.seconds, found=found)


if __name__ == "__main__":
    main()
