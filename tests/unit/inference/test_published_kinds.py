"""Every kind of checkpoint that upstream has published goes from its file to scored cells, by the stages of the jobs.

Upstream published three Census VAEs and ten pairs of a VAE and a flow: five data sets with counts and with a Gaussian
head. The weights here are recorded ones of the same kinds: inputs, heads, strategies of labels.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers.models.published_kinds import GENES, classes_of, write_checkpoint
from helpers.models.upstream_fixtures import FOLDER
from helpers.stages.cell_stages import run_stage, write_cells
from helpers.stages.generation_case import generate
from safetensors.torch import save_file

import scldm
from pipeline.config.context import StageContext
from pipeline.config.job import EvaluateConfig, IngestConfig, ResourcesConfig
from pipeline.core.manifest import Manifest, read_manifest, write_manifest
from pipeline.stages import evaluate, ingest
from scldm.checkpoints.convert.convert import convert_upstream
from scldm.checkpoints.convert.export import export_upstream
from scldm.checkpoints.native import load_flow, load_vae
from scldm.checkpoints.start_from import start_flow, start_vae
from scldm.checkpoints.untrusted import child as untrusted_child
from scldm.checkpoints.untrusted import reader as untrusted
from scldm.data.batch import CellBatch
from scldm.errors import InputError
from scldm.metrics.distribution import two_sample
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="upstream's recordings are not beside this checkout")

CENSUS = {  # published VAE -> recorded one
    "vae_census/20M": "log1p_nbshared_pos_shared",
    "vae_census/70M": "proj_nbunshared_pos_shared",
    "vae_census/270M": "softbin_nbshared_pos_unshared",
}
PAIRS = {  # published pair -> recorded VAE and DiT
    "dentate_gyrus_negative_binomial": ("log1p_nbshared_pos_shared", "me_single"),
    "hlca_negative_binomial": ("log1pzero_nbunshared_nopos_unshared", "me_single"),
    "tabula_muris_negative_binomial": ("sqrt_nbshared_nopos_shared_t07", "me_single_nobias"),
    "replogle_negative_binomial": ("log1p_nbunshared_nopos_shared_flipbias", "me_two"),
    "czb_cd4_naive_holdout_negative_binomial": ("softbin_nbshared_pos_unshared", "joint"),
    "dentate_gyrus_gaussian": ("anscombe_gaussian_pos_shared", "me_single"),
    "hlca_gaussian": ("projconcat_gaussian_nopos_unshared", "me_single"),
    "tabula_muris_gaussian": ("log1p_gaussian_pos_unshared", "me_single_nobias"),
    "replogle_gaussian": ("log1p_gaussian_pos_unshared", "me_two"),
    "czb_cd4_naive_holdout_gaussian": ("anscombe_gaussian_pos_shared", "joint"),
}
FILES = {"ldm_last": "ldm", "ldm_compiled_keys": "ldm", "ldm_legacy_scg_vae_module": "ldm_legacy"}
VAES = sorted({vae for vae, _ in PAIRS.values()} | set(CENSUS.values()))
DITS = ("joint", "me_single", "me_single_nobias", "me_two")
OTHERS = (pytest.mark.slow, pytest.mark.integration)
EVERY = [  # VAE with every flow; one flow each on every change, all of them with the slow tests
    pytest.param(vae, dit, marks=() if (i + j) % len(DITS) == 0 else OTHERS)
    for i, vae in enumerate(VAES)
    for j, dit in enumerate(DITS)
]
FEW = {"umap": False, "n_pcs": 4, "n_top_genes": 40, "transport_cells": 20, "reconstruction_cells": 8, "resamples": 5,
       "refits": 5, "min_class_cells": 8, "n_neighbors": 5}  # fmt: skip
TRACKER = SimpleNamespace(metrics=lambda *a, **k: None, artifact=lambda *a, **k: None)


@pytest.fixture(scope="module", autouse=True)
def _here():
    """Read pickles in this process, with the reader's own code: starting another takes seconds."""

    def read(kind: str, path: Path, out: Path, **_: Any) -> dict[str, Any]:
        if kind == "checkpoint":
            untrusted_child.read_checkpoint(str(path), str(out), torch, save_file)
        else:
            untrusted_child.read_plain(str(path), str(out))
        return json.loads((out / "about.json").read_text())

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untrusted, "_run", read)
        # Seconds for each kind, and tested by themselves: pictures, and a score that fits thousands of regressions.
        patch.setattr(evaluate, "gallery", lambda *_: ())
        patch.setattr(two_sample, "classifier_auroc", lambda *_, **__: 0.5)
        yield


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Model folders of a recorded VAE and DiT, or of a recorded file; each is converted once."""
    root = tmp_path_factory.mktemp("converted")
    made: dict[str, Path] = {}

    def convert(vae: str, dit: str | None = None) -> Path:
        name = f"{vae}+{dit}"
        if name not in made:
            out = root / name / "model"
            if vae in FILES:
                checkpoint, config = (FOLDER / "ckpt" / f for f in (f"{vae}.ckpt", f"{FILES[vae]}_config.yaml"))
                convert_upstream(checkpoint, config, out)
            else:
                write_checkpoint(root / name / "upstream", vae, dit).convert(out)
            made[name] = out
        return made[name]

    return convert


def cells_like(model: Path, n: int = 160) -> anndata.AnnData:
    """Cells with counts of the model's genes and classes of its labels, each class with its own genes high."""
    vocabulary = load_vae(model / "vae").vocabulary
    rng = np.random.default_rng(0)
    rate, obs = np.full((n, vocabulary.n_genes), 0.5), {}
    for k, label in enumerate(vocabulary.labels):
        of = rng.integers(0, min(len(label.classes), 3), n)
        rate += 4.0 * ((np.arange(vocabulary.n_genes) + k) % 3 == of[:, None])
        obs[label.name] = pd.Categorical(np.array(label.classes)[of])
    frame = pd.DataFrame(obs, index=[f"cell-{i}" for i in range(n)])
    var = pd.DataFrame(index=list(vocabulary.feature_ids))
    return anndata.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), frame, var)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory, converted):
    """Ingested cells for a model, by its genes and labels; models that share them share the cells."""
    made: dict[str, Manifest] = {}

    def of(model: Path) -> Manifest:
        vocabulary = load_vae(model / "vae").vocabulary
        if vocabulary.digest not in made:
            folder = tmp_path_factory.mktemp("ingest")
            source = {"type": "h5ad", "path": str(write_cells(folder / "cells.h5ad", cells_like(model)))}
            settings = {"source": source, "labels": [x.name for x in vocabulary.labels], "split": {"test": 0.25}}
            config = IngestConfig.model_validate({**settings, "genes": {"vocabulary": str(model)}})
            facts = ingest.run(config, StageContext(folder, {}, 0, SimpleNamespace(), None))
            made[vocabulary.digest] = Manifest("ingest", "i", str(folder), {}, {}, facts, 1.0, 1.0)
        return made[vocabulary.digest]

    return of


def made_by_a_job(folder: Path, model: Path, **settings: Any) -> Manifest:
    """The generate stage of a job that names the model."""
    names = {"vae": str(model / "vae"), "flow": str(model / "flow")}
    facts = generate(folder, settings.pop("inputs", {}), model=names, sampler={"steps": 2}, seed=3, **settings)
    write_manifest(Manifest("generate", "g", str(folder), {}, {}, facts, 1.0, 1.0))
    return read_manifest(folder)


def scored(folder: Path, model: Path, cells: Manifest, **settings: Any) -> dict[str, Any]:
    """The facts of an evaluation: a job generates by the model's name, a job scores."""
    generated = made_by_a_job(folder / "generate", model, inputs={"ingest": cells}, like="test", n_cells=40, **settings)
    context = StageContext(folder / "evaluate", {"ingest": cells, "generate": generated}, 0, ResourcesConfig(), TRACKER)
    return evaluate.run(EvaluateConfig(**FEW), context)


def check_scored(folder: Path, model: Path, cells: Manifest) -> None:
    facts = scored(folder, model, cells)
    report = (folder / "evaluate" / "report.html").read_text()
    scores, labels = facts["metrics"], load_vae(model / "vae").vocabulary.labels
    assert {"w2", "energy", "reconstruction_mse", *(f"label_accuracy.{x.name}" for x in labels)} <= scores.keys()
    assert np.isfinite(list(scores.values())).all()
    if load_vae(model / "vae").vae.config.head == "gaussian":
        assert {"library_size_ks", "reconstruction_nll"} <= facts["left_out"].keys()
        assert "log1p CP10k: values of a Gaussian head" in report
    else:
        assert {"library_size_ks", "reconstruction_nll"} <= scores.keys()
        assert "left_out" not in facts


@pytest.mark.parametrize("kind", PAIRS)
def test_a_published_pair_is_converted_generates_in_a_job_and_is_scored(tmp_path, converted, ingested, kind):
    model = converted(*PAIRS[kind])
    head = load_vae(model / "vae").vae.config.head
    assert (head == "gaussian") == kind.endswith("gaussian")
    check_scored(tmp_path, model, ingested(model))


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_that_upstream_wrote_is_converted_generates_in_a_job_and_is_scored(
    tmp_path, converted, ingested, file
):
    model = converted(file)
    check_scored(tmp_path, model, ingested(model))


@pytest.mark.parametrize(("vae", "dit"), EVERY)
def test_a_job_and_a_notebook_make_the_same_cells_of_every_vae_with_every_flow(tmp_path, converted, vae, dit):
    model = converted(vae, dit)
    label = load_flow(model / "flow").vocabulary.labels[0]
    rows = [{label.name: label.classes[0], "n_cells": 2}, {label.name: label.classes[1], "n_cells": 1}]
    made_by_a_job(tmp_path / "job", model, cells=rows)
    job = scldm.open_cells(tmp_path / "job")[:]
    ours = scldm.load(model).generate(rows, seed=3, sampler={"steps": 2})
    np.testing.assert_array_equal(job.X.toarray(), ours.X.toarray())
    assert list(job.obs[label.name]) == list(ours.obs[label.name]) == [label.classes[0]] * 2 + [label.classes[1]]
    gaussian = load_vae(model / "vae").vae.config.head == "gaussian"
    assert (job.uns["scldm"].get("scale") == "log1p_cp10k") == gaussian
    assert (np.rint(job.X.data) == job.X.data).all() != gaussian


@pytest.mark.parametrize("kind", [*CENSUS, *PAIRS])
def test_a_published_vae_encodes_and_reconstructs_in_a_notebook_and_in_jobs(tmp_path, converted, kind):
    model = converted(*PAIRS[kind]) if kind in PAIRS else converted(CENSUS[kind])
    adata = cells_like(model, 12)
    ours = scldm.load(model)
    latents = ours.encode(adata.copy()).obsm["X_scldm"]
    settings = {"source": {"type": "h5ad", "path": str(write_cells(tmp_path / "a.h5ad", adata))}}
    settings["model"] = {"vae": str(model / "vae")}
    embedded = scldm.open_cells(run_stage("embed", tmp_path / "embed", settings))[:]
    np.testing.assert_allclose(embedded.obsm["X_scldm"], latents, atol=1e-5)
    rebuilt = scldm.open_cells(run_stage("reconstruct", tmp_path / "rebuilt", {**settings, "decode": "mean"}))[:]
    np.testing.assert_allclose(rebuilt.layers["mean"], ours.reconstruct(adata, mean=True).layers["mean"], rtol=1e-4)


@pytest.mark.parametrize("kind", CENSUS)
def test_a_vae_alone_is_told_to_generate_nothing(tmp_path, converted, kind):
    model = converted(CENSUS[kind])
    with pytest.raises(InputError, match="flow"):
        scldm.load(model).generate(n=3)


@pytest.mark.parametrize("kind", [*CENSUS, *PAIRS])
def test_a_published_model_goes_back_to_upstreams_format_and_gives_the_same_cells(tmp_path, converted, kind):
    model = converted(*PAIRS[kind]) if kind in PAIRS else converted(CENSUS[kind])
    flow = model / "flow" if kind in PAIRS else None
    done = export_upstream(model / "vae", flow, tmp_path / "upstream")
    back = convert_upstream(done.folder / "model.ckpt", done.folder / "config.yaml", tmp_path / "back")
    for name, value in load_vae(model / "vae").vae.state_dict().items():
        assert torch.equal(value, load_vae(back.vae).vae.state_dict()[name])
    if flow is not None:
        again, first = (scldm.load(m).generate(n=2, seed=1, sampler={"steps": 2}) for m in (tmp_path / "back", model))
        np.testing.assert_array_equal(again.X.toarray(), first.X.toarray())


@pytest.mark.parametrize("kind", [*CENSUS, *PAIRS])
def test_a_published_model_can_be_trained_on_from_its_weights(converted, kind):
    model = converted(*PAIRS[kind]) if kind in PAIRS else converted(CENSUS[kind])
    loaded = load_vae(model / "vae")
    vae = VAE(loaded.vae.config, n_genes=len(GENES))
    started = start_vae(vae, loaded.vocabulary, loaded)
    assert started.genes == {"kept": len(GENES), "new": 0, "dropped": 0}
    assert not started.new
    batch = CellBatch.from_csr(sp.csr_matrix(cells_like(model, 16).X))
    losses = []
    for _ in range(2):  # a step downhill from there
        loss = vae(batch).mean()
        vae.zero_grad()
        loss.backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.square().sum() for p in vae.parameters() if p.grad is not None]).sum().sqrt()
            for p in vae.parameters():
                p.sub_(0.0 if p.grad is None else 1e-3 * p.grad / norm)
        losses.append(loss.item())
    assert losses[1] < losses[0]
    if kind in PAIRS:
        flow = load_flow(model / "flow")
        sizes = {x.name: len(x.classes) for x in flow.vocabulary.labels}
        dit = DiT(flow.dit.config, n_latent_tokens=8, latent_width=16, n_classes=sizes)
        start_flow(dit, flow.vocabulary, flow)
        assert all(torch.equal(x, flow.dit.state_dict()[k]) for k, x in dit.state_dict().items())
    for label in loaded.vocabulary.labels:
        assert label.classes == tuple(classes_of(label.name, len(label.classes)))


def test_an_adaln_decoder_does_what_needs_no_vectors_and_the_rest_with_given_ones(tmp_path, converted, ingested):
    """No published checkpoint has one; the weights are recorded."""
    model = converted("adaln_decode_nbshared", "me_single")
    adata = cells_like(model, 12)
    ours = scldm.load(model)
    assert ours.encode(adata.copy()).obsm["X_scldm"].shape == (12, 128)
    vectors = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    assert ours.reconstruct(adata, decoder_condition=vectors).shape == (12, len(GENES))
    np.save(tmp_path / "vectors.npy", vectors)
    facts = scored(tmp_path, model, ingested(model), decoder_condition=str(tmp_path / "vectors.npy"))
    assert {"w2", "library_size_ks"} <= facts["metrics"].keys()
    assert "reconstruction_mse" not in facts["metrics"]
    assert "Left out: reconstruction scores" in (tmp_path / "evaluate" / "report.html").read_text()
    done = export_upstream(model / "vae", model / "flow", tmp_path / "upstream")
    back = convert_upstream(done.folder / "model.ckpt", done.folder / "config.yaml", tmp_path / "back")
    for name, value in load_vae(model / "vae").vae.state_dict().items():
        assert torch.equal(value, load_vae(back.vae).vae.state_dict()[name])
