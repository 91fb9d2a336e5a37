"""Workers' cells through Ray Data where the object store holds a few blocks; run by `test_small_object_store.py`.

    python small_object_store.py ADDRESS SPILL WORKERS BLOCK

Rows are wide, so that little work makes much data: two epochs of 128 MB. Prints, as JSON, what came and how.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

CELLS, WIDTH, BATCH, EPOCHS = 4096, 8192, 64, 2
SLOW = 0.02  # seconds of a step: reads are faster


@dataclass(frozen=True)
class WideReader:
    """Rows of 32 kB that hold their own id."""

    row_bytes = 4 * WIDTH

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([("soma_joinid", pa.int64()), ("z", pa.list_(pa.float32(), WIDTH))])

    def read(self, rows: np.ndarray) -> pa.Table:
        values = pa.array(np.repeat(rows.astype(np.float32), WIDTH))
        return pa.table([rows, pa.FixedSizeListArray.from_arrays(values, WIDTH)], schema=self.schema)


class WideSource:
    ids, tile, reader = np.arange(CELLS), 64, WideReader()

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return ids

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.reader.read(ids)


def main(address: str, spill: Path, workers: int, block: int) -> None:
    """Each worker has an execution of Ray Data of its own, as in training."""
    import ray

    from pipeline.data.loading.feed import feed
    from pipeline.data.loading.order import FeedOrder

    ray.init(address=address, log_to_driver=False)
    source = WideSource()
    order = FeedOrder(source.ids, source.tile, seed=0, batch_size=BATCH, lanes=2 * workers, block_rows=block)
    ends = {"start_step": 0, "stop_step": EPOCHS * order.n_steps_per_epoch}
    feeds = [
        feed(source, order, rank=rank, world_size=workers, **ends, micro_batch_size=BATCH, engine=engine)
        for rank in range(workers)
        for engine in ("ray", "local")
    ]
    with ExitStack() as stack:  # or an execution that failed starts Ray again as Python ends
        for one in feeds:
            stack.enter_context(closing(one))
        print(json.dumps(_read(feeds, spill)))


def _read(feeds: list[Any], spill: Path) -> dict[str, float]:
    """Every other feed reads with Ray, the one after it the same cells without."""
    seen: Counter[int] = Counter()
    longest, spilled, before = 0.0, 0, time.monotonic()
    for steps in zip(*feeds, strict=True):
        longest = max(longest, time.monotonic() - before)
        for ours, plain in zip(steps[::2], steps[1::2], strict=True):
            assert all(a.equals(b) for a, b in zip(ours.micro, plain.micro, strict=True)), f"step {ours.step}"
            for table in ours.micro:
                real = table["weight"].to_numpy() > 0
                seen.update(table["soma_joinid"].to_numpy()[real].tolist())
        spilled = max(spilled, sum(p.stat().st_size for p in spill.rglob("*") if p.is_file()))
        time.sleep(SLOW)
        before = time.monotonic()
    more = sum(max(0, n - EPOCHS) for n in seen.values())
    less = sum(max(0, EPOCHS - seen[i]) for i in range(CELLS))
    return {"longest_wait_s": longest, "spilled_mb": spilled / 1e6, "duplicates": more, "missing": less}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
