"""Columns of a conditions table, genes that are written: `request_table`, with errors that are bad input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.generation import request_table
from scldm.generation.request_table import check_guidance as check_guidance
from scldm.generation.request_table import read_rows as read_rows


def genes_to_write(genes: Sequence[str] | str | None, vocabulary: Vocabulary) -> np.ndarray | None:
    """As `scldm.generation.request_table.genes_to_write`.

    Raises:
        InputError: names that no gene has, or several have; a file that is not there.
    """
    try:
        return request_table.genes_to_write(genes, vocabulary)
    except request_table.RequestError as error:
        raise InputError(str(error)) from error
