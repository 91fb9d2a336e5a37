"""Kernel launches, host syncs and copies to the device in a step, counted on a pretended CUDA device, without a GPU.

A GPU is kept busy only if the host launches kernels faster than they run and never waits for one. Counted are a
training step of the VAE and of the flow (loss, gradients, clipping, AdamW, EMA; outside logging), a tile of cells
through encode, and a tile through generate (16 evaluations of the flow, decoder, means on the host), on small networks:
counts do not depend on widths or numbers of cells, but on layers, tiles of genes and what the code asks for. An
operation counts as one launch. Torch's compiler is left out: counts are those of eager code.

Names: `{vae_step,flow_step,encode,generate}.{syncs,launches,copies}` for the usual sizes, and the same with `@size`
for others. `--before FILE` takes an earlier JSON of this script as the baseline; without it a row is its own.

    python benchmarks/gpu_budgets.py --json benchmarks/results/gpu_budgets.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

from harness import Row, report

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the pretended device is of the tests
from helpers.pretended import library  # noqa: E402

# The rows with the names that docs and comparisons use, and the step that each is.
USUAL = {
    "vae_step": "vae_step@1024_genes", "flow_step": "flow_step@8_layers", "encode": "encode@1024_genes",
    "generate": "generate@8_layers",
}  # fmt: skip
QUICK = tuple(USUAL.values())
UNITS = {"launches": "launches", "syncs": "host syncs", "copies": "copies to the device"}


def rows_of(found: dict[str, dict[str, int]], before: dict[str, float]) -> list[Row]:
    """Return a row for each step and count; the baseline is that of `before`, or the value itself."""
    named = {**{name: found[step] for name, step in USUAL.items()}, **found}
    rows = []
    for step, totals in named.items():
        for what, value in totals.items():
            name = f"{step}.{what}"
            baseline = before.get(name, float(value))
            ratio = baseline / value if value and baseline else None
            rows.append(Row(name, float(value), UNITS[what], baseline, ratio, 1, None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--quick", action="store_true", help="the usual sizes only")
    parser.add_argument("--before", type=Path, help="an earlier JSON of this script, for the baselines")
    parser.add_argument("--write-budgets", action="store_true",
                        help="write the counts as the budgets that the tests hold the steps to")  # fmt: skip
    a = parser.parse_args()
    if a.quick and a.write_budgets:
        parser.error("--write-budgets needs the counts of all steps: leave --quick out")
    if reason := library.missing():
        print(f"gpu_budgets.py: {reason}; nothing measured", file=sys.stderr)
        raise SystemExit(2)
    before = {} if a.before is None else {r["name"]: r["value"] for r in json.loads(a.before.read_text())["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        library.load(library.build(Path(folder)))
    import torch
    from helpers.pretended import steps

    torch.set_num_threads(1)
    chosen = {name: step for name, step in steps.steps().items() if not a.quick or name in QUICK}
    records = {name: steps.record(step) for name, step in chosen.items()}
    found = {name: record.totals() for name, record in records.items()}
    if a.write_budgets:
        steps.write_budgets(found)
    lines = {name: {"syncs": dict(r.syncs), "copies": dict(r.copies)} for name, r in records.items()}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report(rows_of(found, before), a.json, date=today, device="pretended: cuda:0 on the CPU", lines=lines)


if __name__ == "__main__":
    main()
