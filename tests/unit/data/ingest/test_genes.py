"""A vocabulary from elsewhere: genes are found by id or symbol, counted, and keep ids that the source lacks."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.config.context import StageContext
from pipeline.config.job import GenesConfig, IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.ingest.genes import LACKING, gene_lut, model_genes, read_vocabulary
from pipeline.data.soma.write import write_experiment
from pipeline.stages import ingest
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import InputError

IDS = ["ENSG00000000001.4", "ENSG00000000002", "ENSG00000000003.1", "ENSG00000000004", "ENSG00000000005"]
SYMBOLS = ["CD3E", "MS4A1", "Y_RNA", "Y_RNA", "NKG7"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    counts = np.random.default_rng(0).poisson(3, (60, 5)).astype(np.float32)
    obs = pd.DataFrame({"cell_type": pd.Categorical(["a", "b"] * 30), "is_primary_data": True})
    var = pd.DataFrame({"feature_id": IDS, "feature_name": SYMBOLS, "feature_length": 0})
    return write_experiment(tmp_path_factory.mktemp("genes") / "soma", obs, var, [sp.csr_matrix(counts)])


def listed(folder, genes, name="genes.json"):
    path = folder / name
    path.write_text(json.dumps(genes) if name.endswith("json") else "\n".join(genes))
    return str(path)


def found(store, **config):
    return model_genes(GenesConfig.model_validate(config), store)


def test_versions_of_ids_do_not_count_and_the_order_is_the_vocabularys(store, tmp_path):
    wanted = ["ENSG00000000005.9", "ENSG00000000009", "ENSG00000000001", "ENSG00000000003"]
    genes = found(store, vocabulary=listed(tmp_path, wanted), max_missing=0.25)
    assert genes.table["feature_id"].tolist() == wanted
    assert genes.table["soma_joinid"].tolist() == [4, LACKING, 0, 2]
    assert genes.table["feature_name"].tolist() == ["NKG7", "ENSG00000000009", "CD3E", "Y_RNA"]
    counts = {k: genes.facts["genes"][k] for k in ("matched", "missing", "extra", "ambiguous")}
    assert counts == {"matched": 3, "missing": 1, "extra": 2, "ambiguous": 0}
    assert gene_lut(genes.table, 5).tolist() == [2, -1, 3, -1, 0]
    assert any("1 genes of the vocabulary were not measured: they are taken as zeros" in n for n in genes.notes)


def test_symbols_match_where_asked_and_shared_ones_match_nothing(store, tmp_path):
    path = listed(tmp_path, ["NKG7", "Y_RNA", "CD3E"], "genes.txt")
    genes = found(store, vocabulary=path, match="symbol", max_missing=0.5)
    assert genes.table["soma_joinid"].tolist() == [4, LACKING, 0]
    assert genes.facts["genes"]["ambiguous"] == 1
    assert any("1 genes share their symbol" in n for n in genes.notes)


@pytest.mark.row("D:vocabulary-missing")
def test_too_many_missing_genes_are_refused_with_both_sides_shown(store, tmp_path):
    path = listed(tmp_path, ["CD3E", "NKG7", "MS4A1"])
    with pytest.raises(InputError) as error:
        found(store, vocabulary=path)
    assert "3 of 3 genes" in str(error.value)
    assert "the vocabulary has CD3E, NKG7, MS4A1 and the source ENSG00000000001, ENSG" in str(error.value)
    assert "try ingest.genes.match: symbol" in str(error.value)
    with pytest.raises(InputError, match="3 of 3 genes"):  # nothing at all is never a match
        found(store, vocabulary=path, max_missing=1.0)


@pytest.mark.parametrize("kind", ["json", "txt", "csv", "parquet"])
def test_a_vocabulary_may_be_any_list(store, tmp_path, kind):
    path = tmp_path / f"genes.{kind}"
    table = pd.DataFrame({"feature_id": IDS[:2], "feature_name": ["x", "y"]})
    if kind == "json":
        path.write_text(json.dumps({"genes": IDS[:2]}))
    elif kind == "txt":
        path.write_text("\n".join(IDS[:2]))
    elif kind == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    genes = found(store, vocabulary=str(path))
    assert genes.table["soma_joinid"].tolist() == [0, 1]
    assert genes.table["feature_name"].tolist() == (["x", "y"] if kind in ("csv", "parquet") else ["CD3E", "MS4A1"])


def test_a_models_folder_is_a_vocabulary(store, tmp_path):
    Vocabulary(("ENSG00000000004", "ENSG00000000002"), ("d", "b"), (LabelVocabulary("cell_type", ("a",)),)).save(
        tmp_path / "vocabulary.json"
    )
    for place in (tmp_path, tmp_path / "vocabulary.json"):
        genes = found(store, vocabulary=str(place))
        assert genes.table.to_numpy().tolist() == [[3, "ENSG00000000004", "d"], [1, "ENSG00000000002", "b"]]


def test_vocabularies_that_cannot_be_read_are_explained(store, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, words in [
        (tmp_path / "empty", "name a model folder, a finished stage or a pipeline|has no config.json"),
        (tmp_path / "nowhere.json", "does not exist"),
        (listed(tmp_path, ["A", "A"], "twice.txt"), "more than once"),
        (listed(tmp_path, ["A"], "genes.xlsx"), "ending '.xlsx'"),
    ]:
        with pytest.raises(InputError, match=words):
            found(store, vocabulary=str(path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"vocabulary": "genes.json", "min_cells": 3}, "min_cells .3. leaves out genes"),
        ({"vocabulary": "genes.json", "value_filter": "x > 1"}, "value_filter .* leaves out genes"),
        ({"match": "symbol"}, "name one in vocabulary"),
    ],
)
def test_settings_that_contradict_a_vocabulary_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        GenesConfig.model_validate(config)


def test_the_stage_counts_over_the_vocabulary_and_keeps_ids_of_missing_genes(store, tmp_path):
    wanted = ["ENSG00000000002", "ENSG00000000001", "ENSG00000000077"]  # the last one is nowhere
    genes = {"vocabulary": listed(tmp_path, wanted), "max_missing": 0.5}
    context = StageContext(tmp_path, {}, 0, SimpleNamespace(), None)
    config = IngestConfig.model_validate({"source": {"type": "soma", "uri": store.uri}, "genes": genes})
    facts = ingest.run(config, context)
    data = IngestedDataset.open(Manifest("ingest", "v", str(tmp_path), {}, {}, facts, 0.0, 0.0))
    train = data.anndata("train")
    everything = store.read_ragged(train.obs_names.astype(int).to_numpy())
    dense = sp.csr_matrix((everything.counts, everything.genes, everything.indptr), shape=(train.n_obs, 5)).toarray()
    np.testing.assert_array_equal(train.X.toarray(), np.c_[dense[:, [1, 0]], np.zeros(len(dense))])
    np.testing.assert_array_equal(train.obs["library_size"], dense[:, [0, 1]].sum(1))
    assert list(train.var_names) == wanted
    np.testing.assert_allclose(data.gene_stats["mean"], train.X.toarray().mean(0), rtol=1e-6)
    assert facts["genes"]["missing"] == 1
    assert facts["n_genes"] == 3


SHARED = Path(__file__).resolve().parents[4].parent / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "pbmc3k_full.h5ad").is_file(), reason="../shared/data/pbmc3k_full.h5ad is not here")
def test_real_symbols_and_ids_find_the_same_genes(tmp_path):
    """pbmc3k names genes by symbol and has Ensembl ids beside them."""
    import anndata

    adata = anndata.read_h5ad(SHARED / "pbmc3k_full.h5ad")[:40]
    var = adata.var
    frame = pd.DataFrame(
        {
            "feature_id": var["ensembl_id"].astype(str).to_numpy(),
            "feature_name": var["gene_symbol"].astype(str).to_numpy(),
            "feature_length": 0,
        }
    )
    store = write_experiment(tmp_path / "soma", pd.DataFrame({"n": range(40)}), frame, [sp.csr_matrix(adata.X)])
    clear = frame[~frame["feature_name"].duplicated(keep=False)]
    by_symbol = found(store, vocabulary=listed(tmp_path, list(clear["feature_name"]), "s.json"), match="symbol")
    by_id = found(store, vocabulary=listed(tmp_path, [f"{x}.7" for x in clear["feature_id"]], "i.json"))
    assert by_symbol.table["soma_joinid"].equals(by_id.table["soma_joinid"])
    assert by_id.facts["genes"]["matched"] == len(clear) > 30_000


# ---- lists that users write ------------------------------------------------------------------------------------------
def written(folder, content: str | bytes, name: str = "genes.csv") -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / name)


@pytest.mark.parametrize(
    "content",
    [
        "gene_id\nENSG00000000002\nENSG00000000005\n",
        "\ufeffENSG00000000002\r\nENSG00000000005\r\n\r\n",
        "\ufeffGene ID;Symbol\r\nENSG00000000002;MS4A1\r\nENSG00000000005;NKG7\r\n",
        '"","gene_id","symbol"\n"1","ENSG00000000002","MS4A1"\n"2","ENSG00000000005","NKG7"\n',
        ",gene_name\nENSG00000000002,MS4A1\nENSG00000000005,NKG7\n",
        "n\tensembl_id\n3\tENSG00000000002\n4\tENSG00000000005\n",
    ],
    ids=["header", "bom", "excel", "r", "index", "tabs"],
)
@pytest.mark.parametrize("ending", ["csv", "txt", "tsv"])
def test_a_list_of_genes_is_read_as_excel_and_r_write_it(store, tmp_path, content, ending):
    genes = found(store, vocabulary=written(tmp_path, content, f"genes.{ending}"))
    assert genes.table["feature_id"].tolist() == ["ENSG00000000002", "ENSG00000000005"]
    assert genes.table["feature_name"].tolist() == ["MS4A1", "NKG7"]


def test_a_header_of_symbols_is_no_gene_and_a_gene_of_the_source_is_no_header(store, tmp_path):
    path = written(tmp_path, "symbol\nNKG7\nCD3E\n")
    assert found(store, vocabulary=path, match="symbol").table["feature_id"].tolist() == ["NKG7", "CD3E"]
    assert read_vocabulary(path).feature_ids == ("NKG7", "CD3E")
    assert read_vocabulary(path, known={"symbol"}).feature_ids == ("symbol", "NKG7", "CD3E")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("gene_id\nENSG00000000002\n".encode("utf-16"), "its encoding is UTF-16"),
        ("a;b\nENSG00000000002;x\n", "several columns (a, b): write one gene per line, or a header line"),
        ("gene_id,symbol\nENSG00000000002\n", "a row has 1 fields and the header 2"),
        ("gene_id,symbol\nENSG00000000002,x\n,y\n", "1 of 2 rows name no gene, the first is row 2"),
    ],
)
def test_a_list_that_is_not_clear_is_refused_with_its_path(store, tmp_path, content, words):
    with pytest.raises(InputError) as error:
        found(store, vocabulary=written(tmp_path, content))
    assert words in str(error.value)
    assert "genes.csv cannot be read: " in str(error.value)


def test_genes_that_the_source_lacks_are_named_in_the_note(store, tmp_path):
    wanted = [*IDS[:2], *(f"ENSG0000000010{i}" for i in range(7))]
    notes = found(store, vocabulary=listed(tmp_path, wanted), max_missing=0.9).notes
    assert any("The source lacks ENSG00000000100, ENSG00000000101" in n and n.endswith("and 2 more.") for n in notes)
