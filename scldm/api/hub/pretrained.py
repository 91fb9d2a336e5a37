"""Write a folder for a model hub: `Model.save_pretrained`, `scldm export --to huggingface`.

    README.md            the model card
    model_index.json     the list of parts, and the sha256 of every file but the cards
    evaluation.json      scores and their floors, if there is an evaluation of the flow's cells
    vae/                 model.safetensors, config.json, vocabulary.json, library_size.json, README.md, and
                         label_vectors.safetensors if a label is names with vectors
    flow/                the same, and raw.safetensors, the weights before averaging

The parts are copied byte for byte, so their digests, and the cells that they generate, stay the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from scldm.api.hub.download import INDEX, SUMS, sums_of
from scldm.api.hub.model_card import DescribedModel, model_card
from scldm.api.origin import CARD, EVALUATION, recorded_scores
from scldm.checkpoints.output_folder import atomic_folder, check_output
from scldm.data.labels.vectors import FILE as VECTORS

PARTS = ("vae", "flow")
FILES = (
    "model.safetensors",
    "raw.safetensors",
    "config.json",
    "vocabulary.json",
    VECTORS,
    "library_size.json",
    CARD,
)


def write_pretrained(
    model: DescribedModel, folder: Path, *, force: bool = False, in_python: bool = False, title: str | None = None
) -> Path:
    """Write the parts, the index and the card; return the folder.

    Args:
        force: Replace an earlier model.
        in_python: Whether messages name arguments of `save_pretrained`, and not options of a command.
        title: Of the card, the name that others load it by; None: the folder's.

    Raises:
        CheckpointError: The folder holds something else, or an earlier model and `force` is not set.
    """
    check_output(folder, force=force, is_earlier=lambda p: (p / INDEX).is_file(), in_python=in_python)
    parts = {"vae": model.folders.vae} | ({} if model.folders.flow is None else {"flow": model.folders.flow})
    with atomic_folder(folder) as staging:
        for part, source in parts.items():
            (staging / part).mkdir()
            for name in FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, staging / part / name)
        if (scores := recorded_scores(model.folders)) is not None:
            (staging / EVALUATION).write_text(scores.as_json())
        sums = sums_of(staging)
        index = {"_class_name": "scldm.Model", "format": 1, **{part: part for part in parts}, SUMS: sums}
        (staging / INDEX).write_text(json.dumps(index, indent=1))
        (staging / CARD).write_text(model_card(model, title or folder.name))
    return folder
