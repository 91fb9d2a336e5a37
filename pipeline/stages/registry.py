"""Every stage and the function that runs it.

To add a stage: write `pipeline/stages/<name>.py` with `run(config, context) -> facts`, its settings and needs in
`pipeline/config/job.py`, and a loader here. The modules bring torch, Ray and TileDB, so each is imported when its stage
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config.context import StageContext

StageFunction = Callable[[Any, StageContext], Mapping[str, Any]]
"""From the settings of a stage and its context to the facts that its manifest records."""


def stage_function(stage: str) -> StageFunction:
    """Return the function that runs a stage.

    Raises:
        KeyError: There is no such stage.
    """
    return _LOADERS[stage]()


def _ingest() -> StageFunction:
    from pipeline.stages.ingest import run

    return run


def _train_vae() -> StageFunction:
    from pipeline.stages.train_vae import run

    return run


def _encode() -> StageFunction:
    from pipeline.stages.encode import run

    return run


def _train_flow() -> StageFunction:
    from pipeline.stages.train_flow import run

    return run


def _generate() -> StageFunction:
    from pipeline.stages.generate import run

    return run


def _evaluate() -> StageFunction:
    from pipeline.stages.evaluate import run

    return run


def _embed() -> StageFunction:
    from pipeline.stages.embed import run

    return run


def _reconstruct() -> StageFunction:
    from pipeline.stages.reconstruct import run

    return run


def _perturb() -> StageFunction:
    from pipeline.stages.perturb import run

    return run


def _log_likelihood() -> StageFunction:
    from pipeline.stages.log_likelihood import run

    return run


def _predict_error() -> StageFunction:
    from pipeline.stages.unseen.predict_error import run

    return run


def _distil() -> StageFunction:
    from pipeline.stages.training.distil import run

    return run


_LOADERS: dict[str, Callable[[], StageFunction]] = {
    "ingest": _ingest,
    "train_vae": _train_vae,
    "encode": _encode,
    "train_flow": _train_flow,
    "generate": _generate,
    "evaluate": _evaluate,
    "embed": _embed,
    "reconstruct": _reconstruct,
    "perturb": _perturb,
    "log_likelihood": _log_likelihood,
    "predict_error": _predict_error,
    "distil": _distil,
}
