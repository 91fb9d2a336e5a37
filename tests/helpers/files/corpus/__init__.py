"""A corpus of files of cells as users have them: every layout, type and name, usable or not, made by script.

`CASES` are sources of cells; `tables.TABLES` are tables that users write. `answers.py` asks validate-data, init and
ingest about a case, and compares them with each other and with what anndata, scanpy, scipy and tiledbsoma read from the
same files.
"""

from __future__ import annotations

from helpers.files import faulty_counts, faulty_files, faulty_tables, faulty_tenx
from helpers.files.corpus import experiments, labels, matrices, names, several, tenx
from helpers.files.corpus.case import CorpusCase

FAULTS = [*faulty_counts.CASES, *faulty_tables.CASES, *faulty_files.CASES, *faulty_tenx.CASES]
CASES: list[CorpusCase] = [
    *matrices.CASES,
    *matrices.PLACES,
    *names.NAMES,
    *names.CONTENT,
    *labels.CASES,
    *several.CASES,
    *tenx.CASES,
    *experiments.CASES,
    *(CorpusCase.of_fault(case) for case in FAULTS if case.refused),
]
