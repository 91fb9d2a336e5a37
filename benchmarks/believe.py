"""Whether intervals of predicted errors hold what they promise, on screens whose combinations were left out in turn.

    python benchmarks/believe.py runs/*/predict_error/* --json benchmarks/results/believe.json

Reads left_out.csv of finished predict_error stages. `believe.coverage_90` is the share of errors inside the intervals
that were made without the combination, both measures and all screens together; 0.9 is meant.
`believe.verdict_right` is the share of right verdicts against the shift in counts, beside that of the more frequent one
said always. Screens with too few combinations for 90 % intervals do not count. --quick reads the first folder alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from harness import Row, report

MEASURES = ("delta_pearson", "energy_over_floor")


def covered(folder: Path) -> dict[str, np.ndarray]:
    """Measure -> whether each error lies in its interval."""
    table = pd.read_csv(folder / "left_out.csv")
    ours = table[table["answer"] == "generated"].dropna(subset=[f"{m}_predicted_low" for m in MEASURES])
    return {
        m: ((ours[m] >= ours[f"{m}_predicted_low"]) & (ours[m] <= ours[f"{m}_predicted_high"])).to_numpy()
        for m in MEASURES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="finished predict_error stages")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, every, right, majority = [], [], [], []
    for folder in args.folders[:1] if args.quick else args.folders:
        facts = json.loads((folder / "manifest.json").read_text())["facts"]
        if not facts["coverage_90"]:
            print(f"{folder}: {facts['n_left_out']} combinations are too few for 90 % intervals")
            continue
        found, n, better = covered(folder), facts["n_left_out"], facts["better_than_shift"]
        every += list(found.values())
        right += [facts["verdict_right"]] * n
        majority += [max(better, 1 - better)] * n
        name = folder.parent.parent.name
        rows += [_row(f"believe.coverage_90 {name} {m}", x, 0.9) for m, x in found.items()]
    if every:
        rows.insert(0, _row("believe.coverage_90", np.concatenate(every), 0.9))
        rows.append(_row("believe.verdict_right", np.array(right), float(np.mean(majority))))
    report(rows, args.json)


def _row(name: str, inside: np.ndarray, meant: float) -> Row:
    share = float(inside.mean())
    half = 1.96 * float(np.sqrt(share * (1 - share) / len(inside)))
    return Row(name, share, "share", meant, share / meant, len(inside), (share - half, min(share + half, 1.0)))


if __name__ == "__main__":
    main()
