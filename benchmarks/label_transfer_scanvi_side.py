"""scANVI's labels for query cells: trained on a reference, half of the seconds as scVI.

Runs in scVI's environment (`make .venv-scvi/.installed` makes it) and knows nothing of this repository. Defaults of
scvi-tools but for the likelihood and the length: seconds of the processor on one thread end a training, and so does its
own early stopping.

    python benchmarks/label_transfer_scanvi_side.py FOLDER --seconds 60

FOLDER holds reference.h5ad and query.h5ad (obs: label); probabilities.csv and facts.json are written.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import anndata
import scvi
import torch
from lightning.pytorch.callbacks import Callback

UNKNOWN = "unknown"


class Budget(Callback):
    """Ends a training after some seconds of this process."""

    def __init__(self, seconds: float):
        self.end = time.process_time() + seconds

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or time.process_time() > self.end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="of the processor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scvi.settings.seed = 0
    reference, query = (anndata.read_h5ad(args.folder / f"{name}.h5ad") for name in ("reference", "query"))
    start, epochs = time.process_time(), []
    how = {"accelerator": "cpu", "early_stopping": True, "enable_progress_bar": False, "logger": None}
    scvi.model.SCVI.setup_anndata(reference, labels_key="label")
    first = scvi.model.SCVI(reference, gene_likelihood="nb")
    first.train(callbacks=[Budget(args.seconds / 2)], **how)
    epochs.append(len(first.history["elbo_train"]))
    model = scvi.model.SCANVI.from_scvi_model(first, unlabeled_category=UNKNOWN)
    left = args.seconds - (time.process_time() - start)
    # Its own rule for scANVI is 20 epochs or fewer; the seconds that scVI left are used.
    model.train(max_epochs=400, callbacks=[Budget(left)], **how)
    epochs.append(len(model.history["elbo_train"]))
    seconds = time.process_time() - start
    query.obs["label"] = UNKNOWN
    model.predict(query, soft=True).to_csv(args.folder / "probabilities.csv")
    facts = {"scvi_tools": scvi.__version__, "seconds": seconds, "epochs": epochs}
    (args.folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
