"""`Model.differential_expression` and `Model.transform`: false positives where nothing differs, power where truth is
known; beside Welch's t and Wilcoxon's test on log1p CP10k.

    null        two groups of cells of one type: random halves, 20 against the rest, and one half with 30 % of its
                molecules. Share of genes with p <= 0.05, and of splits with any discovery at 5 % (Benjamini-Hochberg)
    truth       two synthetic types that differ in known genes, of 40 and of 150 cells; and (pbmc3k) random halves of
                which one has lost half of the molecules of 60 genes. Power and false discoveries at 5 %
    generated   a flow that was trained on labels drawn at random (null), and on synthetic types (truth)
    transform   synthetic cells of two batches, all corrected to one: how far batches and types can be told apart in
                principal components, and how near the corrected counts are to what the cells' rates are in that batch

    python benchmarks/notebook_de.py --json benchmarks/results/notebook_de.json
    python benchmarks/notebook_de.py --splits 2 --seconds 3 3 --only synthetic      # does it run at all

Models are trained once, into --out, and what was measured is not measured again.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import perturbation_lines
import scipy.sparse as sp
import torch
from harness import Row, report
from scipy.stats import false_discovery_control, mannwhitneyu, ttest_ind
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

import scldm
from scldm.api.model import Model
from scldm.checkpoints.native import save_flow, save_vae
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.genes.fold_change import log_fold_change
from scldm.metrics.perturbation.screen import Screen

ROOT = Path(__file__).resolve().parents[1]
TYPES, GENES, CELLS = 4, 500, 300  # synthetic: types, genes, cells of a type in a batch
OWN, PROGRAMME = 60, 60  # genes that differ in a type, and genes that vary within all types
LEVEL = 0.05
SETTINGS = ("halves", "20 cells", "depth")
LOST, LOST_GENES = 0.5, 60  # pbmc3k with truth
NEIGHBOURS = 30


@dataclass(frozen=True)
class Synthetic:
    adata: anndata.AnnData  # obs: context (type), treatment (batch)
    share: dict[tuple[str, str], np.ndarray]  # of molecules by type and batch, (g,)
    differs: dict[str, np.ndarray]  # genes that differ in a type from the base, (g,) bool
    factor: np.ndarray  # of each cell's rates, beside its type and batch, (n, g)


def synthetic(seed: int = 0) -> Synthetic:
    """Types and batches change the shares of known genes, and leave those of all others exactly as they are."""
    rng = np.random.default_rng(seed)
    base = np.exp(rng.normal(0, 1.5, GENES))
    base /= base.sum()
    order = rng.permutation(GENES)
    programme, rest = order[:PROGRAMME], order[PROGRAMME:]
    share, differs, counts, names, factors = {}, {}, [], [], []
    batch_genes, effect = rng.random(GENES) < 0.5, rng.normal(0, 0.6, GENES)
    weights = rng.normal(0, 0.7, PROGRAMME)
    for k in range(TYPES):
        genes = rest[k * OWN : (k + 1) * OWN]
        differs[f"type {k}"] = np.isin(np.arange(GENES), genes)
        own = _same_sum(base, genes, np.exp(rng.normal(0, 1.0, OWN)))
        for batch in ("b1", "b2"):
            name = (f"type {k}", batch)
            moved = own if batch == "b1" else _same_sum(own, np.flatnonzero(batch_genes), np.exp(effect[batch_genes]))
            share[name] = moved
            state = rng.normal(size=(CELLS, 1))
            factor = np.ones((CELLS, GENES))
            factor[:, programme] = np.exp(state * weights - weights**2 / 2)
            factor *= rng.gamma(4, 1 / 4, (CELLS, GENES))
            size = rng.lognormal(np.log(2_000 if batch == "b1" else 1_200), 0.35, (CELLS, 1))
            counts.append(sp.csr_matrix(rng.poisson(size * moved * factor).astype(np.float32)))
            factors.append(size * factor)
            names += [name] * CELLS
    obs = pd.DataFrame(names, columns=["context", "treatment"], index=[f"c{i}" for i in range(len(names))])
    var = pd.DataFrame(index=[f"gene{g}" for g in range(GENES)])
    cells = anndata.AnnData(sp.vstack(counts, format="csr"), obs=obs, var=var)
    return Synthetic(cells, share, differs, np.concatenate(factors))


def _same_sum(share: np.ndarray, genes: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Change some genes' shares, and leave their sum: otherwise all other genes would change too."""
    out = share.copy()
    out[genes] *= factor[: len(genes)] if len(factor) == len(genes) else factor
    out[genes] *= share[genes].sum() / out[genes].sum()
    return out


def pbmc3k(folder: Path, seed: int = 0) -> anndata.AnnData:
    """The 2,000 most variable genes; `treatment` is a label drawn at random, `context` the cell type."""
    cells = anndata.read_h5ad(folder / "pbmc3k_full.h5ad")
    logged = log1p_cp10k(cells.X)
    variance = np.asarray(logged.power(2).mean(0)).ravel() - np.asarray(logged.mean(0)).ravel() ** 2
    cells = cells[:, np.sort(np.argsort(-variance)[:2_000])].copy()
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    cells = cells[(cells.obs["cell_type"].value_counts()[cells.obs["cell_type"]] > 100).to_numpy()].copy()
    cells.obs["context"] = cells.obs["cell_type"].astype(str)
    cells.obs["treatment"] = np.random.default_rng(seed).choice(["b1", "b2"], cells.n_obs)
    return cells


def trained(cells: anndata.AnnData, folder: Path, seconds: list[float], seed: int) -> Model:
    """A model of context and treatment, trained once."""
    if not folder.exists():
        counts = sp.csr_matrix(cells.X)
        screen = Screen(counts, *(cells.obs[c].to_numpy().astype(str) for c in ("context", "treatment")), "b1")
        made = perturbation_lines.train(screen, tuple(cells.var_names), seconds=[*seconds, 0], seed=seed)
        save_vae(folder / "vae", made.vae.vae, made.vae.vocabulary, made.vae.library_sizes, card="")
        weights, flow = made.noise.dit.state_dict(), made.noise
        save_flow(
            folder / "flow", {"model": weights, "raw": weights}, config=perturbation_lines.FLOW_SIZES, path=flow.path,
            latent_shape=(flow.n_latent_tokens, flow.latent_width), vocabulary=flow.vocabulary,
            library_sizes=flow.library_sizes, card="",
        )  # fmt: skip
    return scldm.load(folder)


# ---- tests -------------------------------------------------------------------------------------------------------
def p_values(model: Model, cells: anndata.AnnData, seed: int) -> dict[str, pd.DataFrame]:
    """The table of each test of group 1 against group 2 (obs `group`), in the order of the genes."""
    found = {
        name: model.differential_expression(cells, "group", "1", "2", evidence=name, seed=seed).loc[cells.var_names]
        for name in ("counts", "denoised")
    }
    x, first = log1p_cp10k(cells.X).toarray(), (cells.obs["group"] == "1").to_numpy()
    with np.errstate(all="ignore"):
        t = ttest_ind(x[first], x[~first], equal_var=False).pvalue
        rank = mannwhitneyu(x[first], x[~first], method="asymptotic").pvalue
    for name, p in (("welch", t), ("wilcoxon", rank)):
        p = np.where(np.isfinite(p), p, 1.0)
        found[name] = pd.DataFrame({"p_value": p, "p_adjusted": false_discovery_control(p)}, index=cells.var_names)
    return found


def null_split(cells: anndata.AnnData, setting: str, rng: np.random.Generator) -> anndata.AnnData:
    n = cells.n_obs
    first = rng.permutation(n) < (20 if setting == "20 cells" else n // 2)
    out = cells.copy()
    out.obs["group"] = np.where(first, "1", "2")
    if setting == "depth":
        x = out.X.toarray()
        x[first] = rng.binomial(x[first].astype(np.int64), 0.3)
        out.X = sp.csr_matrix(x.astype(np.float32))
        out = out[np.asarray(out.X.sum(1)).ravel() > 0].copy()
    return out


def nulls(model: Model, cells: anndata.AnnData, name: str, splits: int) -> list[Row]:
    rows = []
    for setting in SETTINGS:
        share: dict[str, list[float]] = {}
        found: dict[str, list[bool]] = {}
        for seed in range(splits):
            split = null_split(cells, setting, np.random.default_rng([seed, 1]))
            seen = np.asarray(split.X.sum(0)).ravel() >= 10
            for test, table in p_values(model, split, seed).items():
                share.setdefault(test, []).append(float((table["p_value"][seen] <= LEVEL).mean()))
                found.setdefault(test, []).append(bool((table["p_adjusted"] <= LEVEL).any()))
        for test in share:
            rows.append(_share(f"{name}.null.{setting}.{test}.p_below_0.05", share[test], LEVEL, "of genes"))
            rows.append(_share(f"{name}.null.{setting}.{test}.any_discovery", found[test], LEVEL, "of splits"))
    return rows


def truths(
    model: Model, name: str, draw: Callable[[int], tuple[anndata.AnnData, np.ndarray, np.ndarray]], repeats: int
) -> list[Row]:
    """Power, false discoveries, error and coverage.

    Args:
        draw: From a seed: cells with `group`, the true log2 fold changes (g,), and which genes differ (g,).
    """
    lists: dict[str, list[float]] = {}
    for seed in range(repeats):
        cells, lfc, differs = draw(seed)
        seen = np.asarray(cells.X.sum(0)).ravel() >= 10
        for test, table in p_values(model, cells, seed).items():
            found = (table["p_adjusted"] <= LEVEL).to_numpy()
            add(lists, f"{test}.power", found[differs & seen].mean())
            add(lists, f"{test}.false_discoveries", (found & ~differs).sum() / max(found.sum(), 1))
            add(
                lists, f"{test}.null_genes_p_below_0.05", (table["p_value"].to_numpy() <= LEVEL)[~differs & seen].mean()
            )
            if test == "counts":
                inside = (table["low"] <= lfc) & (lfc <= table["high"])
                add(lists, "interval.coverage", inside[seen].mean())
                add(lists, "interval.coverage_of_genes_that_differ", inside[seen & differs].mean())
                add(lists, "lfc_error.model", np.sqrt(((table["log2_fold_change"] - lfc)[seen] ** 2).mean()))
                add(lists, "lfc_error.counts", np.sqrt(((table["counts_log2_fold_change"] - lfc)[seen] ** 2).mean()))
    return [_share(f"{name}.{k}", v, baseline_of(lists, k), unit_of(k)) for k, v in lists.items()]


def add(lists: dict[str, list[float]], name: str, value: float) -> None:
    lists.setdefault(name, []).append(float(value))


def baseline_of(lists: dict[str, list[float]], name: str) -> float:
    if name.endswith("power"):
        return float(np.mean(lists["welch.power"]))
    if name.startswith("lfc_error"):
        return float(np.mean(lists["lfc_error.counts"]))
    return 1 - LEVEL if "coverage" in name else LEVEL


def unit_of(name: str) -> str:
    return "log2, root mean square" if name.startswith("lfc_error") else "of genes"


def _share(name: str, values: list[float] | list[bool], baseline: float, unit: str) -> Row:
    spread = (float(np.min(values)), float(np.max(values)))
    mean = float(np.mean(values))
    print(f"{name}: {mean:.4f} (of {baseline:.3f}; {spread[0]:.3f} – {spread[1]:.3f})", flush=True)
    return Row(name, mean, unit, baseline, mean / baseline if baseline > 0 else None, len(values), spread)


# ---- cells with truth --------------------------------------------------------------------------------------------
def types_of(made: Synthetic, n: int) -> Callable[[int], tuple[anndata.AnnData, np.ndarray, np.ndarray]]:
    """n cells of each of two types of the first batch."""

    def draw(seed: int) -> tuple[anndata.AnnData, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, 2])
        a, b = rng.permutation(TYPES)[:2]
        obs = made.adata.obs
        rows = [
            rng.permutation(np.flatnonzero((obs["context"] == f"type {k}") & (obs["treatment"] == "b1")))[:n]
            for k in (a, b)
        ]
        cells = made.adata[np.concatenate(rows)].copy()
        cells.obs["group"] = np.repeat(["1", "2"], n)
        lfc = log_fold_change(*(1e4 * made.share[f"type {k}", "b1"] for k in (a, b)))
        return cells, lfc, made.differs[f"type {a}"] | made.differs[f"type {b}"]

    return draw


def lost_molecules(cells: anndata.AnnData) -> Callable[[int], tuple[anndata.AnnData, np.ndarray, np.ndarray]]:
    """Random halves, of which the first has lost molecules of some genes; shares of all others rise a little."""

    def draw(seed: int) -> tuple[anndata.AnnData, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, 3])
        out = null_split(cells, "halves", rng)
        x, first = out.X.toarray(), (out.obs["group"] == "1").to_numpy()
        seen = np.flatnonzero((x.sum(0) >= 30) & (x.sum(0) < 0.005 * x.sum()))
        genes = rng.permutation(seen)[:LOST_GENES]
        share = x.sum(0) / x.sum()
        x[np.ix_(first, genes)] = rng.binomial(x[np.ix_(first, genes)].astype(np.int64), LOST)
        out.X = sp.csr_matrix(x.astype(np.float32))
        kept = np.ones(x.shape[1])
        kept[genes] = LOST
        after = share * kept / (share * kept).sum()
        return out, log_fold_change(1e4 * after, 1e4 * share), kept < 1

    return draw


# ---- generated populations ---------------------------------------------------------------------------------------
def generated_nulls(model: Model, cells: anndata.AnnData, name: str, sizes: tuple[int, ...]) -> list[Row]:
    """Conditions that were drawn at random: of all cells, and of two types."""
    rows = []
    for n in sizes:
        shares, found = [], []
        for kind in (None, "B", "CD14+ Mono"):
            part = cells if kind is None else cells[(cells.obs["context"] == kind).to_numpy()]
            table = model.differential_expression(part, "treatment", "b1", "b2", method="generated", n=n)
            seen = np.asarray(part.X.sum(0)).ravel() >= 10
            table = table.loc[part.var_names]
            shares.append(float((table["p_value"][seen] <= LEVEL).mean()))
            found.append(bool((table["p_adjusted"] <= LEVEL).any()))
        rows.append(_share(f"{name}.generated_null.{n} cells.p_below_0.05", shares, LEVEL, "of genes"))
        rows.append(_share(f"{name}.generated_null.{n} cells.any_discovery", found, LEVEL, "of comparisons"))
    return rows


def generated_truth(model: Model, made: Synthetic) -> list[Row]:
    lists: dict[str, list[float]] = {}
    cells = made.adata[(made.adata.obs["treatment"] == "b1").to_numpy()]
    for a in range(TYPES):
        for b in range(a):
            table = model.differential_expression(
                cells, "context", f"type {a}", f"type {b}", method="generated", n=1_000
            ).loc[cells.var_names]
            lfc = log_fold_change(*(1e4 * made.share[f"type {k}", "b1"] for k in (a, b)))
            differs = made.differs[f"type {a}"] | made.differs[f"type {b}"]
            found = (table["p_adjusted"] <= LEVEL).to_numpy()
            add(lists, "power", found[differs].mean())
            add(lists, "false_discoveries", (found & ~differs).sum() / max(found.sum(), 1))
            add(lists, "coverage", ((table["low"] <= lfc) & (lfc <= table["high"])).mean())
    bases = {"power": 1.0, "false_discoveries": LEVEL, "coverage": 1 - LEVEL}
    return [_share(f"synthetic.generated.{k}", v, bases[k], "of genes") for k, v in lists.items()]


# ---- batches -----------------------------------------------------------------------------------------------------
def batches(model: Model, made: Synthetic) -> list[Row]:
    """Before and after all cells are corrected to the second batch."""
    corrected = model.transform(made.adata, {"treatment": "b2"}, seed=0)
    corrected = corrected[:, made.adata.var_names]
    stay = (made.adata.obs["treatment"] == "b2").to_numpy()
    assert (corrected.X[stay] != made.adata.X[stay]).nnz == 0
    rows, of_before = [], {}
    for name, cells in (("before", made.adata), ("after", corrected)):
        points = TruncatedSVD(20, random_state=0).fit_transform(log1p_cp10k(cells.X))
        for label, ideal in (("treatment", 0.0), ("context", 1.0)):
            value = float(silhouette_score(points, made.adata.obs[label]))
            of_before.setdefault(label, value)
            rows.append(_share(f"transform.silhouette_of_{label}.{name}", [value], of_before[label], f"ideal {ideal}"))
        near = NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(points).kneighbors(points)[1][:, 1:]
        share = stay[near].mean(1).clip(1e-9, 1 - 1e-9)
        entropy = float(-(share * np.log2(share) + (1 - share) * np.log2(1 - share)).mean())
        of_before.setdefault("entropy", entropy)
        rows.append(_share(f"transform.batch_entropy.{name}", [entropy], of_before["entropy"], "bits of neighbours"))
    errors: dict[str, list[float]] = {"own": [], "corrected": []}
    for k in range(TYPES):
        of_type = ~stay & (made.adata.obs["context"] == f"type {k}").to_numpy()
        truth = made.share[f"type {k}", "b2"]
        for name, cells in (("own", made.adata), ("corrected", corrected)):
            mean = np.asarray(cells.X[of_type].sum(0)).ravel()
            errors[name].append(float(np.sqrt((log_fold_change(1e4 * mean / mean.sum(), 1e4 * truth) ** 2).mean())))
    own = float(np.mean(errors["own"]))
    rows += [_share(f"transform.error_of_type_means.{k}", v, own, "log2, root mean square") for k, v in errors.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "notebook_de")
    parser.add_argument("--only", choices=["synthetic", "pbmc3k"])
    parser.add_argument("--splits", type=int, default=16)
    parser.add_argument("--seconds", type=float, nargs=2, default=[40.0, 60.0], metavar=("VAE", "FLOW"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, took = [], {}
    for name, stages in (("synthetic", of_synthetic), ("pbmc3k", of_pbmc3k)):
        for part, measure in stages(args).items() if args.only in (None, name) else ():
            file = args.out / f"{name}-{part}-{args.splits}-splits.json"
            if not file.exists():
                start = time.process_time()
                found = [asdict(row) for row in measure()]
                file.write_text(json.dumps({"rows": found, "took": round(time.process_time() - start)}))
            made = json.loads(file.read_text())
            rows += [Row(**row) for row in made["rows"]]
            took[f"{name}-{part}"] = made["took"]
    report(rows, args.json, seconds=args.seconds, splits=args.splits, took=took)


def of_synthetic(args: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    made = synthetic()
    model = trained(made.adata, args.out / "synthetic", args.seconds, 0)
    of_one = (made.adata.obs["context"] == "type 0") & (made.adata.obs["treatment"] == "b1")
    repeats = max(args.splits // 2, 1)
    return {
        "transform": lambda: batches(model, made),
        "truth": lambda: [
            row for n in (40, 150) for row in truths(model, f"synthetic.truth.{n} cells", types_of(made, n), repeats)
        ],
        "null": lambda: nulls(model, made.adata[of_one.to_numpy()].copy(), "synthetic", repeats),
        "generated": lambda: generated_truth(model, made),
    }


def of_pbmc3k(args: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    cells = pbmc3k(args.data)
    model = trained(cells, args.out / "pbmc3k", args.seconds, 0)
    one = cells[(cells.obs["context"] == "CD14+ Mono").to_numpy()].copy()
    splits = max(args.splits // 4, 1)
    return {
        "null": lambda: nulls(model, one, "pbmc3k", splits),
        "truth": lambda: truths(model, "pbmc3k.truth", lost_molecules(one), splits),
        "generated": lambda: generated_nulls(model, cells, "pbmc3k", (200, 1_000)),
    }


if __name__ == "__main__":
    main()
