"""A layer of any name can be read, and the advice to set it is the setting that reads it."""

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.files.h5ad_cases import counts

from pipeline.config.job import IngestConfig
from pipeline.data.inspection.examine import Question, examine
from pipeline.data.sources.open import open_source
from scldm.errors import InputError

N, G = counts().shape


def file(folder: Path, *layers: str, raw: bool = False) -> Path:
    obs = pd.DataFrame({"cell_type": (["a", "b"] * N)[:N]}, index=[f"c{i}" for i in range(N)])
    adata = ad.AnnData(
        sp.csr_matrix(counts() / 2), obs=obs, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(G)])
    )
    if raw:
        adata.raw = adata.copy()
    for layer in layers:
        adata.layers[layer] = sp.csr_matrix(counts())
    adata.write_h5ad(folder / "c.h5ad")
    return folder / "c.h5ad"


def opened(path: Path, layer: str | None = None):
    source = {"type": "h5ad", "path": str(path), "layer": layer}
    return open_source(IngestConfig.model_validate({"source": source}), path.parent, ["cell_type"]).store


@pytest.mark.parametrize("name", ["counts", "raw", "null", "X", "raw.X", "my layer"])
@pytest.mark.parametrize("raw", [False, True], ids=["", "with adata.raw"])
def test_the_layer_that_the_advice_names_is_read(tmp_path, name, raw):
    path = file(tmp_path, name, raw=raw)
    [found] = examine(Question(str(path)))
    with pytest.raises(InputError) as refused:
        opened(path)
    for text in ("\n".join(f.text() for f in found.errors), str(refused.value)):
        layer = re.search(r"set ingest\.source\.layer: (.+?)(?: or|$)", text, re.MULTILINE)[1]
        [again] = examine(Question(str(path), layer=layer))
        assert not again.errors
        rows = opened(path, layer).read_ragged(np.arange(N))
        assert (rows.row_sums == counts().sum(1)).all()


def test_raw_is_never_taken_for_a_layer_of_that_name(tmp_path):
    path = file(tmp_path, "raw")
    with pytest.raises(InputError, match="has no raw; layers: layers/raw"):
        opened(path, "raw")
