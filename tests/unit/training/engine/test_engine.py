"""The private parts of DeepSpeed that the engine relies on, and what a worker does not import."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import pipeline.training.worker
from pipeline.training.engine.deepspeed import _import_deepspeed
_import_deepspeed()
print(*sorted({"mlflow", "sklearn", "matplotlib", "ray", "transformers"} & sys.modules.keys()), sep=",")
from deepspeed.autotuning import Autotuner
print(Autotuner.__name__)
"""


def test_deepspeed_still_has_the_switch_that_disables_compilation_on_a_cpu():
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_a_worker_does_not_import_what_it_does_not_use_and_leaves_deepspeed_intact():
    """It would cost seconds of every start, and of every restart after a kill."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    brought, autotuner = done.stdout.split("\n")[-3:-1]
    assert brought == ""
    assert autotuner == "Autotuner"
