"""What our engine relies on in DeepSpeed's private parts, and what a worker does not bring into memory."""

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


def test_deepspeed_still_has_the_switch_that_spares_a_cpu_the_compiler():
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_a_worker_starts_without_what_it_does_not_use_and_leaves_deepspeed_whole():
    """Seconds of every start, and of every start again after a kill."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    brought, autotuner = done.stdout.split("\n")[-3:-1]
    assert brought == ""
    assert autotuner == "Autotuner"
