"""Treatments that nobody measured: perturbations asked for by their vector, and doses between and beyond the measured.

Synthetic screens with a known truth. In `vectors`, 40 perturbations have a vector of 8 numbers each, and the logarithm
of a perturbation's effect is a part linear in the vector, a part that is not, and a part of its own that no vector
tells; 30 are measured, in one context or in two, and 10 are asked for. In `dose`, an effect saturates with the dose;
six doses are measured, two between them and one beyond are asked for. One VAE and one flow are trained on the measured
cells, as in `perturbation_lines.py`, with the label of the treatment a vector or a number.

Each answer is a shift: the mean change of log1p CP10k against control. Ours are

    carried in counts     the context's control cells, carried to the asked treatment, their counts changed
    noise                 new cells of the treatment against the measured control cells
    noise beside noise    new cells of the treatment against new cells of the control, so that what the decoder gets
                          wrong in both is gone

and free are, for vectors, the mean of the measured shifts, the shift of the nearest vector, and ridge regression of
shifts on vectors; for doses, the shift of the nearest dose, and the straight line between two in the log of the dose.
The truth is the mean of fresh cells.

    python benchmarks/perturbation_vectors.py --json benchmarks/results/perturbation_vectors.json

What is there is not made again: results lie in --out, and a run that was stopped goes on.

Shape letters: n cells, g genes, k measured treatments, p numbers of a vector.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from harness import Row, report
from perturbation_lines import CONTEXT, TREATMENT, Trained, cells_of, encode, moved, shift_of, train_flow, train_vae

from scldm.checkpoints.asked_values import with_values
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.label_type import LabelType
from scldm.data.labels.values import Number, Vectors, number_key
from scldm.data.labels.vectors import NamedVectors, fit_vectors
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.perturbation.screen import Screen

ROOT = Path(__file__).resolve().parents[1]
GENES, CELLS, CONTROLS, FRESH = 200, 60, 300, 1_500  # cells of a treatment, of the control, and of the truth
PERTURBATIONS, ASKED, WIDTH = 40, 10, 8
TOUCHED, LINEAR, CURVED, OWN = 0.2, 0.5, 0.4, 0.15  # share of genes a part touches, and sizes of log effects
MEASURED_DOSES, ASKED_DOSES = ("0.03", "0.1", "1", "3", "30", "100"), ("0.3", "10", "300")
HALF, LARGEST = 2.0, 0.8  # dose of half the effect, and the size of the log effect
PENALTIES = 10.0 ** np.arange(-2, 4)  # of the ridge regression, chosen by leaving out one measured treatment
CARRIED = 32  # control cells of an answer
DEPTH = 500  # counts of a cell: at 1,500 the decoder did not use the latents after 250 steps
OURS = ("carried in counts", "noise", "noise beside noise")
CONTROL = "control"
Answers = dict[str, np.ndarray]  # who -> shift (g,)


@dataclass(frozen=True)
class Asked:
    """A screen, its label of treatments, and what is asked of it with the true shifts."""

    screen: Screen
    label: LabelVocabulary
    truth: dict[tuple[str, str], np.ndarray]  # context, treatment -> shift (g,)
    free: Callable[[str, str], Answers]  # of a context and a treatment


# ---- screens -----------------------------------------------------------------------------------------------------
def vectors(n_contexts: int, seed: int) -> Asked:
    rng = np.random.default_rng([seed, n_contexts])
    names = [f"gene {i:02d}" for i in range(PERTURBATIONS)]
    table = rng.normal(size=(PERTURBATIONS, WIDTH))
    effects = table @ _programs(WIDTH, LINEAR / WIDTH**0.5, rng)
    hidden = np.tanh(table @ rng.normal(size=(WIDTH, 4)) / 2)
    effects += hidden @ _programs(4, CURVED / 2, rng) + OWN * rng.normal(size=(PERTURBATIONS, GENES))
    measured, asked = names[:-ASKED], names[-ASKED:]
    screen, truth = _draw(dict(zip(names, effects, strict=True)), measured, asked, n_contexts, rng)
    classes = tuple(sorted([CONTROL, *measured]))
    values = Vectors(classes, fit_vectors(TREATMENT, NamedVectors(tuple(names), table), measured), (CONTROL,))
    at = dict(zip(names, table, strict=True))

    def free(context: str, treatment: str) -> Answers:
        shifts = np.stack([screen.mean(context, t) - screen.mean(context, CONTROL) for t in measured])
        known = np.stack([at[t] for t in measured])
        nearest = int(np.linalg.norm(known - at[treatment], axis=1).argmin())
        return {
            "mean perturbation": shifts.mean(0),
            "nearest vector": shifts[nearest],
            "ridge": ridge(known, shifts, at[treatment]),
        }

    return Asked(screen, LabelVocabulary(TREATMENT, classes, values=values), truth, free)


def dose(seed: int) -> Asked:
    rng = np.random.default_rng([seed, 3])
    effect = LARGEST * _programs(1, 1.0, rng)[0]
    effects = {d: effect * float(d) / (float(d) + HALF) for d in (*MEASURED_DOSES, *ASKED_DOSES)}
    screen, truth = _draw(effects, MEASURED_DOSES, ASKED_DOSES, 1, rng)
    values = Number.fit([*MEASURED_DOSES, CONTROL], scale="log", zero=(CONTROL,))
    classes = tuple(sorted([*MEASURED_DOSES, CONTROL], key=lambda c: number_key(c, values.zero)))

    def free(context: str, treatment: str) -> Answers:
        shifts = np.stack([screen.mean(context, d) - screen.mean(context, CONTROL) for d in MEASURED_DOSES])
        known, x = np.log10([float(d) for d in MEASURED_DOSES]), np.log10(float(treatment))
        line = np.array([np.interp(x, known, column) for column in shifts.T])  # beyond the last: the last
        return {"nearest dose": shifts[np.abs(known - x).argmin()], "straight line": line}

    return Asked(screen, LabelVocabulary(TREATMENT, classes, LabelType("float64", False), values), truth, free)


def _programs(n: int, size: float, rng: np.random.Generator) -> np.ndarray:
    """Log effects (n, g) of size `size` on a share of the genes each."""
    return size * rng.normal(size=(n, GENES)) * (rng.random((n, GENES)) < TOUCHED) / TOUCHED**0.5


def _draw(
    effects: dict[str, np.ndarray], measured: Sequence[str], asked: Sequence[str], n_contexts: int,
    rng: np.random.Generator,
) -> tuple[Screen, dict[tuple[str, str], np.ndarray]]:  # fmt: skip
    """Return the measured cells, and the true shifts of what is asked; an effect is the same in all contexts."""
    log, counts, names, truth = rng.normal(-1, 1.2, GENES), [], [], {}
    for c in (f"type {i}" for i in range(n_contexts)):
        profile = log + 0.5 * rng.normal(size=GENES)
        for t in (CONTROL, *measured):
            n = CONTROLS if t == CONTROL else CELLS
            counts.append(sp.csr_matrix(_cells(profile + effects.get(t, 0.0), n, rng)))
            names += [(c, t)] * n
        base = _mean(_cells(profile, 4 * FRESH, rng))
        truth |= {(c, t): _mean(_cells(profile + effects[t], FRESH, rng)) - base for t in asked}
    context, treatment = (np.array(x) for x in zip(*names, strict=True))
    return Screen(sp.vstack(counts, format="csr").astype(np.float32), context, treatment, CONTROL), truth


def _cells(log: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    share = np.exp(log) / np.exp(log).sum()
    size = rng.lognormal(np.log(DEPTH), 0.3, n)
    return rng.poisson(np.outer(size, share) * rng.gamma(4, 1 / 4, (n, GENES)))


def _mean(counts: np.ndarray | sp.csr_matrix) -> np.ndarray:
    return np.asarray(log1p_cp10k(counts).mean(0)).ravel()


def ridge(known: np.ndarray, shifts: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Predict a shift (g,) from a vector (p,): regression of shifts (k, g) on vectors (k, p).

    The penalty is the one with the smallest error on each measured treatment by the others.
    """
    centre, scale = known.mean(0), known.std(0)
    x = np.concatenate([np.ones((len(known), 1)), (known - centre) / scale], axis=1)
    own = np.concatenate([[1.0], (asked - centre) / scale])
    free = np.diag([0.0, *np.ones(known.shape[1])])  # the intercept has no penalty
    errors = []
    for penalty in PENALTIES:
        hat = x @ np.linalg.solve(x.T @ x + penalty * free, x.T)
        errors.append((((shifts - hat @ shifts) / (1 - np.diag(hat))[:, None]) ** 2).mean())
    best = PENALTIES[int(np.argmin(errors))]
    return own @ np.linalg.solve(x.T @ x + best * free, x.T @ shifts)


# ---- answers -----------------------------------------------------------------------------------------------------
def train(asked: Asked, *, seconds: Sequence[float], seed: int) -> Trained:
    """Train the VAE and the flow on the measured cells, for some seconds of the processor each."""
    screen = asked.screen
    screen = screen[np.random.default_rng([seed, 7]).permutation(len(screen.context))]
    genes = tuple(f"gene{g}" for g in range(GENES))
    contexts = LabelVocabulary(CONTEXT, tuple(sorted(set(screen.context.tolist()))))
    vocabulary = Vocabulary(genes, genes, (contexts, asked.label))
    cells = cells_of(screen)
    vae, _ = train_vae("scratch", cells, vocabulary, None, replay=None, seconds=seconds[0], seed=seed, components=True)
    z = encode(vae, cells)
    flow: LoadedFlow = train_flow(screen, z, vocabulary, seconds=seconds[1], seed=seed, start="noise")
    return Trained(vae, flow, None)


def predict(trained: Trained, asked: Asked, seed: int) -> list[dict[str, dict[str, float]]]:
    """Return the scores of all answers, for each context and treatment that is asked."""
    vae: LoadedVAE = trained.vae
    flow = with_values(trained.noise, [{TREATMENT: treatment} for _, treatment in asked.truth])
    wide, scores = Trained(vae, flow, None), []
    for context in sorted({c for c, _ in asked.truth}):
        control = cells_of(asked.screen[asked.screen.members[context, CONTROL][:CARRIED]])
        made = moved(wide, control, CONTROL, CONTROL, seed, ("noise",))[0]["noise"]
        for (c, treatment), true in asked.truth.items():
            if c != context:
                continue
            found = moved(wide, control, CONTROL, treatment, seed, ("noise", "carried"))[0]
            own = {
                "carried in counts": shift_of(found["carried in counts"], control.counts),
                "noise": _mean(found["noise"]) - asked.screen.mean(context, CONTROL),
                "noise beside noise": shift_of(found["noise"], made),
            }
            scores.append({who: score(x, true) for who, x in (own | asked.free(context, treatment)).items()})
    return scores


def score(shift: np.ndarray, true: np.ndarray) -> dict[str, float]:
    return {
        "correlation": round(float(np.corrcoef(shift, true)[0, 1]), 5),
        "squared_error": round(float(((shift - true) ** 2).mean()), 6),
    }


# ---- rows --------------------------------------------------------------------------------------------------------
def rows(name: str, found: list[dict[str, object]]) -> list[Row]:
    """Return a row for each measure, answer of ours and free answer; the spread is that of the seeds."""
    made = []
    seeds: list[list[dict[str, dict[str, float]]]] = [run["scores"] for run in found]  # type: ignore[misc]
    for measure in ("correlation", "squared_error"):
        means = {who: [float(np.mean([s[who][measure] for s in of])) for of in seeds] for who in seeds[0][0]}
        for who in OURS:
            for other in [x for x in means if x not in OURS]:
                sides = list(zip(means[who], means[other], strict=True))
                ratios = [b / a if measure == "squared_error" else a / b for a, b in sides]
                ours, theirs = (float(np.mean(side)) for side in zip(*sides, strict=True))
                sound = min(min(side) for side in sides) > 0
                ratio = theirs / ours if measure == "squared_error" else ours / theirs
                label = f"{name}.{measure}.{who.replace(' ', '_')}_vs_{other.replace(' ', '_')}"
                n = sum(len(of) for of in seeds)
                made.append(
                    Row(label, ours, measure, theirs, ratio if sound else None, n,
                        (min(ratios), max(ratios)) if sound else None)
                )  # fmt: skip
    return made


def table(name: str, found: list[dict[str, object]]) -> str:
    """Means over what is asked and seeds; in brackets the lowest and the highest seed."""
    lines = [f"| {name} | correlation | squared error |", "|---|---|---|"]
    seeds: list[list[dict[str, dict[str, float]]]] = [run["scores"] for run in found]  # type: ignore[misc]
    for who in seeds[0][0]:
        cells = []
        for measure, digits in (("correlation", 3), ("squared_error", 4)):
            means = [np.mean([s[who][measure] for s in of]) for of in seeds]
            low, mid, high = (f"{x:.{digits}f}" for x in (min(means), np.mean(means), max(means)))
            cells.append(f"{mid} ({low} – {high})")
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "perturbation_vectors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=["vectors1", "vectors2", "dose"], action="append")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=[20, 15], metavar=("VAE", "FLOW"), help="of the processor"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 3 s for each network: does it run at all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.seconds = 1, [3, 3]
    torch.set_num_threads(1)
    screens: dict[str, Callable[[int], Asked]] = {
        "vectors1": lambda seed: vectors(1, seed),
        "vectors2": lambda seed: vectors(2, seed),
        "dose": dose,
    }
    found: dict[str, list[dict[str, object]]] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or list(screens):
        for seed in range(args.seeds):
            budget = "-".join(f"{x:g}" for x in args.seconds)
            file = args.out / f"{name} {budget} s seed {seed}.json"
            if not file.exists():
                start, asked = time.process_time(), screens[name](seed)
                trained = train(asked, seconds=args.seconds, seed=seed)
                run: dict[str, object] = {"seed": seed, "scores": predict(trained, asked, seed)}
                file.write_text(json.dumps(run | {"seconds": round(time.process_time() - start, 1)}))
            found.setdefault(name, []).append(json.loads(file.read_text()))
        print(table(name, found[name]), flush=True)
    made = [row for name, runs in found.items() for row in rows(name, runs)]
    report(made, args.json, budgets=args.seconds, found=found)


if __name__ == "__main__":
    main()
