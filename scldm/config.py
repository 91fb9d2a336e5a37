"""Base class of all configurations: strict, frozen, choices only.

A configuration never holds a fact about the data (how many genes, how many classes); facts are read from manifests and
passed as arguments when an object is built. An unknown key is an error; nothing mutates a configuration.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Immutable pydantic model that refuses unknown keys and non-finite numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
