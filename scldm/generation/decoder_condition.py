"""Condition vectors of an adaLN decoder.

A decoder that upstream builds with `use_adaln` takes a vector for each cell beside the latents: `decode(z, genes,
library_size, condition)`, with condition (b, 1, d). Upstream defines no source of it: its VAE has no embedding of
labels, its `forward`, which training uses, passes no condition, nor does its sampling, and the configuration in its
repository sets `use_adaln: false`. So nothing here makes such a vector from labels: it is the caller's, who knows what
the decoder was trained with.

Shape letters: r rows of a request or cells, d width of the decoder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from scldm.errors import InputError
from scldm.nn.config import VAEConfig

NEEDED = (
    "the VAE has an adaLN decoder, which decodes a cell under a vector of {d} numbers. Upstream defines no source of "
    "it: its VAE embeds no labels, and its training and sampling pass none"
)


class DecoderConditionError(InputError, ValueError):
    """Raised for condition vectors that a decoder cannot take, or that it needs and has not got."""


def decoder_vectors(config: VAEConfig, given: Any, n: int, *, per: str) -> np.ndarray | None:
    """Return the condition vectors of n cells or rows, (n, d) float32; None for a decoder that takes none.

    Args:
        config: Of the VAE.
        given: Numbers, (d,) for all or (n, d); None if there are none.
        n: Number of cells or rows.
        per: What has a vector, for messages: a cell, or a row of the request.

    Raises:
        DecoderConditionError: The decoder needs vectors and has none, takes none, or takes others.
    """
    d = config.for_decoder().d_model
    if not config.adaln:
        if given is not None:
            raise DecoderConditionError(
                "decoder_condition: the VAE's decoder takes none (adaln is false); leave it out"
            )
        return None
    if given is None:
        raise DecoderConditionError(
            f"{NEEDED.format(d=d)}. Give the vectors that this decoder was trained with: decoder_condition, ({d},) for "
            f"all or one for {per}"
        )
    try:
        vectors = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DecoderConditionError(f"decoder_condition must be numbers ({error})") from None
    if vectors.shape not in ((d,), (n, d)):
        raise DecoderConditionError(
            f"decoder_condition has shape {vectors.shape}; it must be ({d},) for all, or ({n}, {d}), one for {per}"
        )
    if not np.isfinite(vectors).all():
        raise DecoderConditionError(f"decoder_condition must be finite; {int((~np.isfinite(vectors)).sum())} are not")
    return np.broadcast_to(vectors, (n, d))


def read_vectors(path: str) -> np.ndarray:
    """Read condition vectors of a `.npy` file, (d,) or (r, d).

    Raises:
        DecoderConditionError: It is no such file.
    """
    try:
        found = np.load(Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DecoderConditionError(
            f"decoder_condition: {path} is no .npy file of numbers ({str(error).splitlines()[0]}); write one with "
            "numpy.save"
        ) from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise DecoderConditionError(f"decoder_condition: {path} holds no array of numbers; numpy.save writes one")
    return found


def vectors_digest(vectors: np.ndarray | None) -> dict[str, str]:
    """Return the entry of uns["scldm"] for condition vectors (n, d): a hash of them; nothing without any."""
    if vectors is None:
        return {}
    return {"decoder_condition": hashlib.sha256(np.ascontiguousarray(vectors, np.float32).tobytes()).hexdigest()}


def refuse_adaln(config: VAEConfig, what: str) -> None:
    """Raise DecoderConditionError if something decodes that cannot be given condition vectors."""
    if config.adaln:
        raise DecoderConditionError(
            f"{NEEDED.format(d=config.for_decoder().d_model)}, and {what} takes none; encode, embed and generate (with "
            "decoder_condition) can use this model"
        )
