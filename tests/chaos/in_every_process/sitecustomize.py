"""Python runs this file in every process that has its folder on the path: the nodes and workers of a soak (../soak.py).

Training workers then write down of which cells each step is made, without a line for it in the program itself.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time

FOLDER, MODULE = os.environ.get("SCLDM_SOAK_CELLS"), "pipeline.training.objectives.vae"


class Watched(importlib.abc.MetaPathFinder):
    """Puts the recording into the module as it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            record(module.VaeObjective)

        spec.loader.exec_module = exec_module
        return spec


def record(objective):
    import torch.distributed as dist

    original = objective.loss

    def loss(self, model, batch, part):
        rank = dist.get_rank()
        row = {"step": part.step, "rank": rank, "start": part.start, "pid": os.getpid(), "at": time.time()}
        row["cells"] = batch.joinids[batch.weight > 0].tolist()
        with open(f"{FOLDER}/cells-{rank}-{os.getpid()}.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        return original(self, model, batch, part)

    objective.loss = loss


if FOLDER:
    sys.meta_path.insert(0, Watched())
