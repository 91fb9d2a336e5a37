"""Cells a second from disk to the trainer: our shuffled stream beside the plain scan of the same store and its rivals.

50,000 made-up cells of 60,664 genes, written once as the Census is (and as h5ad shards, and into our cache) under
--folder. All sides read them in turn, in one process. Rows count cells per CPU second over the process tree; the table
of sides gives the clock as well.

    python benchmarks/data_throughput.py --json benchmarks/results/data_throughput.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import data_sides as sides_of
import torch
from cells_on_disk import CellsOnDisk, cells_on_disk
from harness import Row, report
from model_speed import resident
from rounds import Side, in_rounds, markdown, row, side_table

N_GENES = 60_664
OBJECT_STORE = 2 << 30
ROWS = {  # name: ours, baseline
    "stream_shuffled_vs_scan": ("stream_shuffled", "scan"),
    "stream_padded_vs_scan": ("stream_padded", "scan"),
    "stream_shuffled_vs_tiledbsoma_ml": ("stream_shuffled", "tiledbsoma_ml"),
    "cache_vs_scan": ("cache_padded", "scan"),
    "cache_vs_cellarium": ("cache_padded", "cellarium"),
}


def all_sides(cells: CellsOnDisk, block_rows: int) -> list[Side]:
    """Through Ray as many epochs as make 50,000 cells: one execution covers many epochs in training too."""
    epochs = max(1, round(50_000 / cells.n_cells))
    source, cache = cells.source(), sides_of.cache_of(cells)
    stream = lambda *args, **kwargs: sides_of.stream(*args, block_rows=block_rows, **kwargs)  # noqa: E731
    found = [
        sides_of.scan(cells),
        stream("stream_shuffled", source, engine="local", pad=False, note="ragged Arrow batches, read in this process"),
        stream(
            "stream_padded",
            source,
            engine="ray",
            pad=True,
            epochs=epochs,
            note="through Ray Data to padded torch batches",
        ),
        stream("cache_shuffled", cache, engine="local", pad=False, note="our cache, ragged, read in this process"),
        stream(
            "cache_padded",
            cache,
            engine="ray",
            pad=True,
            epochs=epochs,
            note="our cache through Ray Data to padded torch batches",
        ),
        sides_of.tiledbsoma_ml(cells),
        sides_of.cellarium(cells),
    ]
    return [side for side in found if side is not None]


def memory_row(cells: CellsOnDisk, block_rows: int, n: int) -> Row:
    """Highest resident memory of a fresh process that streams an epoch: all cells beside a quarter of them."""

    def peak(n_cells: int) -> float:
        command = [
            sys.executable, __file__, "--peak-of", str(n_cells), "--cells", str(cells.n_cells),
            "--folder", str(cells.folder.parent), "--block-rows", str(block_rows),
        ]  # fmt: skip
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pairs = [(peak(cells.n_cells), peak(cells.n_cells // 4)) for _ in range(n)]
    ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    return Row("rss_at_4x_cells", ours, "MiB", other, statistics.median(ratios), n, (min(ratios), max(ratios)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--quick", action="store_true", help="16,384 cells, blocks of 4,096; for a look, not a claim")
    parser.add_argument("--cells", type=int, help="cells of the experiment (50,000)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "scldm-benchmark")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (5)")
    parser.add_argument("--block-rows", type=int, help="rows of a block (8,192)")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    cells = cells_on_disk(a.folder, n_cells=a.cells or (16_384 if a.quick else 50_000), n_genes=N_GENES)
    block_rows = a.block_rows or (4096 if a.quick else 8192)
    if a.peak_of:
        for _ in sides_of.tables(cells.source(a.peak_of), block_rows=block_rows, engine="local"):
            pass
        print(resident("VmHWM"))
        return
    torch.set_num_threads(1)  # as a training worker by default
    with ray_cluster():
        sides = all_sides(cells, block_rows)
        runs = in_rounds(sides, a.rounds)
    rows = [row(name, runs, ours=x, baseline=y) for name, (x, y) in ROWS.items() if x in runs and y in runs]
    rows.append(memory_row(cells, block_rows=cells.n_cells // 32, n=1 if a.quick else 3))
    table = side_table(sides, runs, "scan")
    report(
        rows, a.json, cells=cells.n_cells, genes=N_GENES, block_rows=block_rows, sides=table, absent=sides_of.absent()
    )
    print("\n" + markdown(table))
    print("\n".join(sides_of.absent()))


class ray_cluster:
    """A Ray cluster in this machine for as long as it is needed."""

    def __enter__(self) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        import ray

        ray.init(
            address="local", num_cpus=os.cpu_count(), include_dashboard=False, object_store_memory=OBJECT_STORE,
            log_to_driver=False, configure_logging=False,
        )  # fmt: skip

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()


if __name__ == "__main__":
    main()
