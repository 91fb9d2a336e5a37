"""On a corpus of files as users have them, every part reads the same cells, and what is not usable is refused by all.

Each file is read by validate-data, init and ingest, and once more by anndata, scanpy, scipy or tiledbsoma alone; cells,
genes, classes and every count must be equal. The corpus is in `tests/helpers/files/corpus`.
"""

from __future__ import annotations

import gc
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.files.cell_strategies import odd_cells, valid_cells
from helpers.files.corpus import CASES
from helpers.files.corpus.answers import ask_all, differences
from helpers.files.corpus.case import CorpusCase
from helpers.files.corpus.labels import DROP
from helpers.files.corpus.tables import TABLES
from helpers.files.h5ad_cases import SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.ingest import HeldOutConfig
from pipeline.config.stages import GenerateConfig
from pipeline.data.ingest.held_out import columns_of, read_combinations
from pipeline.inference.request import read_request
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = [case for case in CASES if not case.name.startswith("fault ")]  # those are in test_faulty_cells.py
WHOLE_EVERY = 12  # cases: the whole stage takes as long as all else together
EDGE = SHARED / "edge"
edge = pytest.mark.skipif(not EDGE.is_dir(), reason=f"the files of others are not at {EDGE}")


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection():
    """cellarium-ml collects garbage with every file that it drops: over all objects of all libraries, half a second."""
    import cellarium.ml.data.distributed_anndata  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def compared(case: CorpusCase, folder: Path, *, whole: bool = False) -> list[str]:
    """Write the files of a case, ask every part about them, and return the differences.

    Args:
        whole: Whether to run the whole ingest stage; `benchmarks/corpus.py` does so for all cases.
    """
    for name in ("given", "made", "again"):
        (folder / name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = whole or case.source.get("type") == "soma"  # which is read in place
        answers = ask_all(case.written(folder / "given"), folder / "made", whole=whole)
        return differences(answers, folder / "again")


def test_the_corpus_is_large_and_every_case_has_a_name_of_its_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len(HERE) + len(TABLES) >= 150


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_every_part_reads_the_same_cells_or_refuses_them(case, tmp_path):
    assert compared(case, tmp_path, whole=HERE.index(case) % WHOLE_EVERY == 0) == []


# ---- files of others ---------------------------------------------------------------------------------------------
def paths(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(EDGE)) for pattern in patterns for p in EDGE.glob(pattern))


def of_others(name: str, kind: str = "h5ad", path: Path | None = None, **more: Any) -> CorpusCase:
    given = {"labels": (), "usable": None, **more}
    return CorpusCase(name, lambda folder, rng: path or EDGE / name, {"type": kind}, **given)


@edge
@pytest.mark.parametrize(
    "name", paths("h5ad_versions/*.h5ad", "soma/*.h5ad", "h5ad_versions/*.md", "h5ad_versions/*.zip")
)
def test_an_h5ad_file_of_others_is_read_as_anndata_reads_it(name, tmp_path):
    assert compared(of_others(name), tmp_path) == []


@edge
def test_labels_of_others_are_read_as_anndata_reads_them(tmp_path):
    case = of_others("pbmc3k_2700_62missing_labels.h5ad", labels=("cell_type",), config=DROP)
    assert compared(case, tmp_path, whole=True) == []


@edge
@pytest.mark.parametrize("name", paths("10x/*/**/*.mtx*", "10x/*/**/*.h5", "10x/*/*.tar.gz"))
def test_an_output_of_others_is_read_as_scanpy_reads_it(name, tmp_path):
    name = str(Path(name).parent) if ".mtx" in name else name
    assert compared(of_others(name, "10x"), tmp_path) == []


@edge
@pytest.mark.parametrize("name", paths("soma/*-exp-*.tar.gz"))
def test_an_experiment_of_others_is_read_as_tiledbsoma_reads_it(name, tmp_path):
    with tarfile.open(EDGE / name) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [place] = {p.parent for p in (tmp_path / "unpacked").rglob("obs") if (p.parent / "ms").is_dir()}
    assert compared(of_others(name, "soma", path=place), tmp_path) == []


# ---- files of hypothesis -----------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cells=st.one_of(valid_cells(), odd_cells()))
def test_whatever_anndata_writes_every_part_says_the_same_of_it(cells, tmp_path_factory):
    def make(folder, rng):
        cells.write_h5ad(folder / "cells.h5ad")
        return folder / "cells.h5ad"

    case = CorpusCase("made by hypothesis", make, usable=None)
    assert compared(case, tmp_path_factory.mktemp("case")) == []


# ---- tables ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
def test_a_table_of_conditions_is_read_row_by_row_or_refused(case, tmp_path):
    classes = sorted({name for name, _ in case.rows})
    vocabulary = Vocabulary(("g",), ("g",), (LabelVocabulary("cell_type", tuple(classes)),))
    config = GenerateConfig(conditions=str(case.conditions(tmp_path)))
    if not case.usable:
        with pytest.raises(InputError, match="table"):
            read_request(config, vocabulary, {})
        return
    rows = read_request(config, vocabulary, {}).rows
    assert [(row.condition["cell_type"], row.n_cells) for row in rows] == list(case.rows)


def held_out(config: HeldOutConfig) -> list[tuple[str, str]]:
    """Return the class and the split of each row; a column that obs lacks is refused, as by ingest."""
    if other := [c for c in columns_of(config) if c != "cell_type"]:
        raise InputError(f"the table names {', '.join(other)}, and obs has no such column")
    return [(x.classes["cell_type"], x.split) for x in read_combinations(config)]


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
def test_a_table_of_held_out_classes_is_read_row_by_row_or_refused(case, tmp_path):
    config = HeldOutConfig(table=str(case.held_out(tmp_path)))
    if not case.usable:
        with pytest.raises(InputError, match="table"):
            held_out(config)
        return
    assert held_out(config) == [(name, "test") for name, _ in case.rows]
