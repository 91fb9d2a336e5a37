"""Every kind of model is exported and registered with a card that says what is known, and what is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.models.exported_model import new_export
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, write_flow, write_vae
from typer.testing import CliRunner

import scldm
from pipeline.cli.app import app
from pipeline.config.context import StageContext
from pipeline.config.job import ResourcesConfig, TrainFlowConfig, TrainVaeConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.stages import train_vae
from pipeline.stages.training.spec import flow_spec, vae_spec
from scldm.data.vocabulary import Vocabulary

ENSEMBL = tuple(f"ENSG{i:011d}" for i in range(6))
COUNTS = np.arange(12).reshape(2, 6)


class NoTracker:
    def metrics(self, values, step): ...

    def spec(self):
        return {}


def finished(root, stage, inputs, facts, *, config=None, version="v1"):
    """Write the manifest of a stage of the pipeline `census`."""
    folder = root / "census" / stage / version
    folder.mkdir(parents=True, exist_ok=True)
    names = {k: m.version for k, m in inputs.items()}
    made = Manifest(stage, version, str(folder), config or {}, names, facts, 1.0, 1.0)
    write_manifest(made)
    return made


def ingest(root, genes=GENES, **source):
    root.mkdir(exist_ok=True)
    Vocabulary(genes, genes, (CELL_TYPES, DONORS)).save(root / "vocabulary.json")
    facts = {"vocabulary": "vocabulary.json", "source": f"h5ad {root}/cells.h5ad", "digest": "abc", "n_genes": 6,
             "n_cells": {"train": 80, "validation": 10, "test": 10}, "labels": ["cell_type", "donor"]}  # fmt: skip
    config = {
        "source": {"type": "h5ad", "path": f"{root}/cells.h5ad", **source},
        "split": {"validation": 0.1, "test": 0.1, "by": "donor_id", "held_out": None},
    }
    made = finished(root, "ingest", {}, facts, config=config)
    shutil.move(root / "vocabulary.json", made.folder)
    return made


def context(root, inputs):
    return StageContext(root / "stage", inputs, 0, ResourcesConfig(), NoTracker(), output=None)


def trained(root, **start):
    """A pipeline whose stages have the cards that training gives them; its models have random weights."""
    cells = ingest(root)
    vae_card = vae_spec(TrainVaeConfig.model_validate(start), context(root, {"ingest": cells})).card
    vae = finished(root, "train_vae", {"ingest": cells}, {"model": "model"})
    write_vae(vae.path("model"), CELL_TYPES, DONORS)
    (vae.path("model") / "README.md").write_text(vae_card)
    flow_card = flow_spec(TrainFlowConfig(), context(root, {"ingest": cells, "train_vae": vae})).card
    flow = finished(root, "train_flow", {"ingest": cells, "train_vae": vae}, {"model": "model"})
    write_flow(flow.path("model"), CELL_TYPES, DONORS)
    (flow.path("model") / "README.md").write_text(flow_card)
    return {"ingest": cells, "train_vae": vae, "train_flow": flow}


def evaluated(root, inputs, version="v1", **scores):
    """An evaluation of cells of the pipeline's flow."""
    cells = finished(root, "generate", inputs, {}, version=version)
    facts = {"metrics": scores, "floor": {k: v / 2 for k, v in scores.items()}, "verdict": "nearer the floor than NB"}
    config = {"split": "test", "protocol": "default"}
    finished(root, "evaluate", {"generate": cells}, facts, config=config, version=version)


def card_of(name, out):
    scldm.load(name).save_pretrained(out)
    return (out / "README.md").read_text()


# ---- what a card says --------------------------------------------------------------------------------------------
def test_the_card_of_a_pipeline_says_what_its_stages_recorded(tmp_path):
    evaluated(tmp_path, trained(tmp_path), w2=12.5)
    card = card_of(tmp_path / "census", tmp_path / "out")
    for said in (
        "* data: h5ad cells.h5ad (digest abc)",
        "'train': 80, 'validation': 10, 'test': 10",
        "* split: validation 0.1, test 0.1, by donor_id",
        "* organism: unknown (not recorded)",
        "* licence of the data: unknown (not recorded)",
        "* weights: trained from random ones on these data",
        "6 genes by id (g0, g1, g2, …)",
        "* label `cell_type`: T, B, NK",
        "| w2 | 12.5 | 6.25 |",
        "nearer the floor than NB",
        "## Licence\n\nUnknown",
        "license: unknown",
        'from_pretrained("out")',
    ):
        assert said in card
    assert str(tmp_path) not in card, "it would reveal folders of this machine"


def test_scores_travel_with_the_flow_that_they_are_of_and_with_no_other(tmp_path):
    inputs = trained(tmp_path)
    evaluated(tmp_path, inputs, w2=12.5)
    first, second = tmp_path / "first", tmp_path / "second"
    card_of(tmp_path / "census", first)
    assert "| w2 | 12.5 | 6.25 |" in card_of(first, second)
    shutil.rmtree(second / "flow")
    write_flow(second / "flow", CELL_TYPES, DONORS, n_layers=2)
    assert "Unknown: there is no evaluation" in card_of(second, tmp_path / "third")
    other = finished(tmp_path, "train_flow", inputs, {"model": "model"}, version="v2")
    write_flow(other.path("model"), CELL_TYPES, DONORS)
    assert "Unknown: there is no evaluation" in card_of(other.folder, tmp_path / "fourth")


@pytest.mark.parametrize(
    ("genes", "source", "organism"),
    [
        (ENSEMBL, {}, "human, by the Ensembl ids of the genes"),
        (ENSEMBL, {"organism": "mus_musculus"}, "mus_musculus"),
        ((*ENSEMBL[:5], "ENSMUSG00000000001"), {}, "unknown (not recorded)"),
        ((*ENSEMBL[:5], "TP53"), {}, "unknown (not recorded)"),
    ],
)
def test_the_organism_is_that_of_the_source_or_of_all_gene_ids(tmp_path, genes, source, organism):
    cells = ingest(tmp_path, genes, **source)
    assert f"* organism: {organism}\n" in vae_spec(TrainVaeConfig(), context(tmp_path, {"ingest": cells})).card


def test_a_model_that_was_started_from_another_names_it_and_what_is_known_of_it(tmp_path):
    trained(tmp_path / "old")
    trained(tmp_path / "new", start_from={"model": str(tmp_path / "old" / "census")})
    card = card_of(tmp_path / "new" / "census", tmp_path / "out")
    assert "* weights: trained on these data, from those of old/census (digest " in card
    assert "* old/census: data: h5ad cells.h5ad (digest abc)" in card
    assert str(tmp_path) not in card


def test_a_vae_that_is_used_as_it_is_does_not_claim_to_be_trained_on_the_data(tmp_path):
    write_vae(tmp_path / "old" / "vae", CELL_TYPES)
    cells = ingest(tmp_path)
    shutil.copy(tmp_path / "old" / "vae" / "library_size.json", cells.folder)
    facts = {**cells.facts, "library_size": "library_size.json"}
    cells = Manifest("ingest", "v1", cells.folder, cells.config, {}, facts, 1.0, 1.0)
    place = context(tmp_path, {"ingest": cells})
    train_vae.run(TrainVaeConfig(pretrained=str(tmp_path / "old")), place)
    card = card_of(place.folder / "model", tmp_path / "out")
    assert "unchanged: not trained on these data (digest " in card
    assert "what it was trained on is not known: its card does not say" in card


def test_what_no_card_states_is_called_unknown(tmp_path):
    write_vae(tmp_path / "pair" / "vae", CELL_TYPES)
    card = card_of(tmp_path / "pair", tmp_path / "out")
    assert "* unknown, because nothing recorded it: data, organism, split, weights, licence of the data" in card
    assert "None: a VAE alone makes no cells to compare." in card
    assert "generate" not in card


def test_the_card_of_a_gaussian_head_says_what_its_cells_hold(tmp_path):
    write_vae(tmp_path / "pair" / "vae", CELL_TYPES, head="gaussian")
    assert "log1p of counts per 10,000, and no counts" in card_of(tmp_path / "pair", tmp_path / "out")


# ---- kinds of models ---------------------------------------------------------------------------------------------
def pair(root, **vae):
    write_vae(root / "pair" / "vae", CELL_TYPES, DONORS, **vae)
    write_flow(root / "pair" / "flow", CELL_TYPES, DONORS)
    return root / "pair"


def converted(root, monkeypatch):
    made = new_export(root, monkeypatch)
    result = made.run()
    assert result.exit_code == 0, result.output
    return made.out


KINDS = {
    "pair": lambda root, patch: pair(root),
    "gaussian": lambda root, patch: pair(root, head="gaussian"),
    "folder": lambda root, patch: pair(root) / "vae",
    "pipeline": lambda root, patch: trained(root)["ingest"] and root / "census",
    "stage": lambda root, patch: trained(root)["train_flow"].folder,
    "stage of a VAE": lambda root, patch: trained(root)["train_vae"].folder,
    "converted": converted,
}
kinds = pytest.mark.parametrize("kind", KINDS)
WITHOUT_FLOW = ("folder", "stage of a VAE")


@kinds
def test_every_kind_is_exported_with_a_card_and_loads(kind, tmp_path, monkeypatch):
    place = KINDS[kind](tmp_path, monkeypatch)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(place), "--to", "huggingface", "--out", str(out)])
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    for section in ("Use", "Genes and labels", "Training", "Scores", "Licence", "Limits"):
        assert f"\n## {section}\n" in card
    own, again = scldm.load(place), scldm.load(out)
    cells = anndata.AnnData(
        sp.csr_matrix(COUNTS.astype(np.float32)), var=pd.DataFrame(index=own.vocabulary.feature_ids)
    )
    np.testing.assert_array_equal(again.encode(cells.copy()).obsm["X_scldm"], own.encode(cells).obsm["X_scldm"])
    assert (again.flow is None) == (kind in WITHOUT_FLOW)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.mark.parametrize("kind", ["pair", "gaussian", "folder", "pipeline", "converted"])
def test_every_kind_is_registered_with_its_card_and_predicts(kind, uri, tmp_path, monkeypatch):
    import mlflow

    place = KINDS[kind](tmp_path, monkeypatch)
    result = CliRunner().invoke(app, ["mlflow", "register", str(place), "--name", kind, "--uri", uri])
    assert result.exit_code == 0, result.output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # what the line below changes is put back
    mlflow.set_tracking_uri(uri)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{kind}/1", dst_path=str(tmp_path / "got")))
    loaded = mlflow.pyfunc.load_model(str(folder))
    mlflow.set_tracking_uri(None)
    assert "\n## Licence\n" in (folder / "README.md").read_text()
    own = scldm.load(place)
    if kind in WITHOUT_FLOW:
        table = pd.DataFrame(COUNTS, columns=own.vocabulary.feature_ids)
        cells = anndata.AnnData(sp.csr_matrix(table.to_numpy(np.float32)), var=pd.DataFrame(index=table.columns))
        np.testing.assert_array_equal(loaded.predict(table).to_numpy(), own.encode(cells).obsm["X_scldm"])
        with pytest.raises(Exception, match="takes counts and no params; got seed"):
            loaded.unwrap_python_model().predict(None, table, {"seed": 1})
    else:
        predicted = loaded.predict(pd.DataFrame({"cell_type": ["B"], "n_cells": [3]}), params={"seed": 5})
        made = own.generate({"cell_type": "B"}, n=3, seed=5).X.toarray()
        np.testing.assert_array_equal(predicted.to_numpy(), made)
        assert predicted.to_numpy().dtype == made.dtype


def test_models_of_a_stage_are_registered_under_its_pipeline_and_folders_under_their_name(tmp_path, uri):
    for place, name in (
        (trained(tmp_path)["train_vae"].folder, "scldm-census"),
        (pair(tmp_path) / "vae", "scldm-pair"),
    ):
        result = CliRunner().invoke(app, ["mlflow", "register", str(place), "--uri", uri])
        assert f"registered: models:/{name}/1" in result.output


def test_a_model_elsewhere_is_registered_under_a_name_that_is_given(uri):
    result = CliRunner().invoke(app, ["mlflow", "register", "hf://lab/census@main", "--uri", uri])
    assert result.exit_code == 2
    assert "hf://lab/census@main is no folder to name the registered model after; give --name" in result.output


def test_the_card_of_a_converted_checkpoint_names_its_file_and_what_it_does_not_know(tmp_path, monkeypatch):
    card = card_of(converted(tmp_path, monkeypatch), tmp_path / "card")
    assert "* weights: converted from upstream's model.ckpt\n" in card
    assert "* unknown, because nothing recorded it: data, organism, split, licence of the data\n" in card


def test_the_line_about_old_cells_reveals_no_folder():
    from pipeline.stages.training.model_card import _old_cells

    source = "training cells of /home/me/secret/runs/census/ingest/1a2b (h5ad /data/private/cells.h5ad)"
    [line] = _old_cells({"replay": {"n_cells": 5, "source": source}})
    assert line == "of the training cells, 5 are old ones: training cells of 1a2b (h5ad cells.h5ad)"
