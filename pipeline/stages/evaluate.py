"""Evaluate generated cells against held-out real ones; writes the report, metrics and figures.

Reads the manifests of ingest, train_vae and generate. `pipeline.report.evaluation` computes the scores in memory from a
sample of the generated cells; scores that need one pass only are computed over all of them (`report.streamed`). Cells
of a Gaussian head are compared on log1p CP10k, the scale of their values.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData

from pipeline.config.context import StageContext
from pipeline.config.job import EvaluateConfig, SyntheticSource
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.controls import COMPARED
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.sources.synthetic import gene_ids
from pipeline.data.sources.synthetic_trajectories import Process, expected_counts, fresh_counts
from pipeline.report.combinations import GENERATED, JOIN, combination_means, titled_means
from pipeline.report.evaluation import NB, POISSON, Decoded, Evaluation, evaluate
from pipeline.report.gallery import gallery
from pipeline.report.html import Picture, ReportInputs, write_report
from pipeline.report.outputs import summary_lines, write_tables
from pipeline.report.streamed import stream_generated
from pipeline.stages.unseen.finished import believed, finished_predictions, judged_by
from scldm.cells.cells import Cells, open_cells
from scldm.checkpoints.native import LoadedVAE, load_vae
from scldm.data.batch import CellBatch
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.generation.real_cells import draw_sparse
from scldm.metrics.cell_set import class_text
from scldm.metrics.distribution.true_process import TrueProcess
from scldm.metrics.from_anndata import cell_set
from scldm.metrics.genes.expression import as_counts
from scldm.nn.vae import CountDistribution

VAE_BATCH = 64  # cells
FRESH_CELLS = 4_000  # at least about so many, of the process of synthetic cells
TO = "to_"  # prefix of the columns of perturb
NO_LABEL = "cells"  # name of the label of a model without labels


def _vae_of(cells: Manifest, inputs: Mapping[str, Manifest]) -> Path:
    """Return the VAE that the cells were made with: of train_vae, of a joint training, or one that was named."""
    return cells.path("vae") if "vae" in cells.facts else inputs["train_vae"].path("model")


def run(config: EvaluateConfig, context: StageContext) -> dict[str, Any]:
    """Evaluate, write the tables, report.html and figures/*.png, and return the facts."""
    result = _evaluated(config, context.inputs)
    pictures = list(gallery(result, config, training_records(context.inputs)))
    write_outputs(context.folder, result, pictures, inputs=context.inputs, config=config)
    _track(context, result, pictures)
    print("\n".join(summary_lines(result)), flush=True)
    values = {name: {k: s.value for k, s in scores.items()} for name, scores in result.baselines.items()}
    return {
        "report": "report.html",
        "metrics": {k: s.value for k, s in result.generated.items()},
        "half_width": {k: s.half_width for k, s in result.generated.items() if s.half_width is not None},
        "floor": {k: s.value for k, s in result.floor.items()},
        "baseline": values[POISSON],
        "baselines": values,
        "verdict": result.verdict,
        **({"left_out": result.left_out} if result.left_out else {}),
        **({} if result.truth is None else {"process": result.truth.as_plain()}),
    }


def _evaluated(config: EvaluateConfig, inputs: Mapping[str, Manifest]) -> Evaluation:
    """Read training, held-out and generated cells, and score them."""
    ingested = IngestedDataset.open(inputs["ingest"])
    held_out = ingested.anndata(config.split, max_cells=config.max_cells, seed=config.seed)
    training = ingested.anndata("train", max_cells=config.max_cells + held_out.n_obs, seed=config.seed)
    made = inputs[config.cells]
    cells = open_generated(made, held_out.var_names)
    if config.cells == "perturb":
        cells.obs = under_new_labels(cells.obs)
    generated = read_generated(cells, max_cells=config.max_cells, rng=np.random.default_rng(config.seed))
    loaded = load_vae(_vae_of(made, inputs))
    config = with_known_control(config, loaded.vocabulary)
    labels = [label.name for label in loaded.vocabulary.labels]
    if not labels:  # a model without conditions: the baselines are fitted to all cells together
        labels = [NO_LABEL]
        for obs in (held_out.obs, training.obs, generated.obs, cells.obs):
            obs[NO_LABEL] = "all"
    streamed, missing = stream_generated(cells, cell_set(held_out, labels), labels)
    known = ingested.measured_by(held_out.obs_names.astype(np.int64).to_numpy())
    adaln = loaded.vae.config.adaln
    decoded = (
        None if adaln
        else decode_cells(loaded, held_out, n_cells=config.reconstruction_cells, measured=known, seed=config.seed)
    )  # fmt: skip
    result = evaluate(
        held_out=held_out, training=training, generated=generated, labels=labels, config=config, decoded=decoded,
        streamed=streamed, truth=ingested.truth,
        process=true_process(inputs["ingest"], held_out),
    )  # fmt: skip
    result = replace(result, changed=changes_counts(made))
    if adaln:
        result.notes.append("Left out: reconstruction scores (an adaLN decoder needs condition vectors of real cells).")
    result.notes.extend(_predicted_notes(result, inputs))
    if missing:
        result.notes.append(
            f"{len(missing)} classes of held-out cells were not generated, the first is {class_text(missing[0])}."
        )
    return result


def changes_counts(made: Manifest) -> bool:
    """Return whether cells are measured ones whose counts were changed, as some ways of perturb make them."""
    return made.config.get("method") in ("pooled", "shift") or made.config.get("counts") == "changed"


def true_process(ingest: Manifest, held_out: AnnData) -> TrueProcess | None:
    """Return what is known of the process that synthetic held-out cells were drawn from; None if there is none.

    Args:
        ingest: Manifest of ingest, whose settings name the source.
        held_out: Cells by soma_joinid, which is their place in the source, over the genes of the vocabulary.
    """
    settings = ingest.config.get("source", {})
    if settings.get("type") != "synthetic" or settings.get("within_types") != "trajectories":
        return None
    source, rows = SyntheticSource(**settings), held_out.obs_names.to_numpy().astype(np.int64)
    genes = pd.Index(gene_ids(source.n_genes)).get_indexer(held_out.var_names)
    if (genes < 0).any():
        return None  # the vocabulary of another model holds genes that these cells do not have
    fresh = fresh_counts(source, rows, per_cell=max(1, FRESH_CELLS // len(rows)))
    return TrueProcess(
        expected_counts(source, rows)[:, genes], Process.of(source).theta[genes], sp.csr_matrix(fresh[:, genes])
    )


def with_known_control(config: EvaluateConfig, vocabulary: Vocabulary) -> EvaluateConfig:
    """Return the settings with control classes as the data call them: B+A is A+B in a label of sets.

    Raises:
        InputError: A label has no such class. Labels that the model lacks are left to `evaluate`.
    """
    given = dict(config.control or {})
    known = {name: value for name, value in given.items() if name in vocabulary.n_classes}
    found = given | vocabulary.classes_of(known, COMPARED)
    return config.model_copy(update={"control": found}) if found else config


def _predicted_notes(result: Evaluation, inputs: Mapping[str, Manifest]) -> list[str]:
    """Return what predict_error said of the combinations that are scored, beside what was found."""
    pipeline = Path(inputs["ingest"].folder).parent.parent
    if "perturb" in inputs:
        judged = judged_by(inputs["perturb"].config)
    elif "generate" in inputs:
        how = inputs["generate"].config  # predictions are of cells from noise, by the flow of this pipeline
        own = how.get("model") is None and how.get("start", "noise") == "noise"
        judged = ("flow", "noise") if own else None
    else:
        judged = None
    if judged is None:
        return []
    found = finished_predictions(pipeline, inputs["ingest"], method=judged[0], start=judged[1])
    if found is None:
        return []
    context = [x for x in found.labels if x not in found.treatment]
    treatment = [x for x in found.labels if x in found.treatment]
    said = {tuple(JOIN.join(row[x] for x in part) for part in (context, treatment)): row for row in found.rows.values()}
    return [
        f"{one.context}{JOIN}{one.treatment}: {believed(row)}. Found: {one.scores[GENERATED]['delta_pearson']:.2f} "
        f"(predict_error {found.version})."
        for one in result.combinations.scored
        if (row := said.get((one.context, one.treatment))) is not None
    ]


def _track(context: StageContext, result: Evaluation, pictures: Sequence[Picture]) -> None:
    """Log metrics: eval/<name>, its _floor, eval_ci/<name> (half of the 95 % interval), eval_nb/<name>."""
    tracker = context.tracker
    tracker.metrics({f"eval/{metric_key(k)}": s.value for k, s in result.generated.items()}, step=0)
    tracker.metrics({f"eval/{metric_key(k)}_floor": s.value for k, s in result.floor.items()}, step=0)
    widths = {k: s.half_width for k, s in result.generated.items()}
    tracker.metrics({f"eval_ci/{metric_key(k)}": v for k, v in widths.items() if v is not None}, step=0)
    tracker.metrics({f"eval_nb/{metric_key(k)}": s.value for k, s in result.baselines[NB].items()}, step=0)
    for answer, scores in combination_means(result.combinations).items():
        values = {f"eval_combinations/{measure} {answer}": v for measure, v in scores.items()}
        tracker.metrics(values, step=0)
    for path in (context.folder / name for name in ("report.html", "metrics.json", "combinations.html")):
        if path.is_file():
            tracker.artifact(path)
    for picture in pictures:
        tracker.artifact(context.folder / "figures" / f"{picture.name}.png", folder="figures")


def metric_key(name: str) -> str:
    """Return a name that MLflow accepts: class names may hold any characters."""
    return re.sub(r"[^\w\-. /]", "_", name)


def open_generated(manifest: Manifest, genes: pd.Index) -> Cells:
    """Open all committed shards lazily. Raises InputError if there are no cells, or not all genes were written."""
    cells = open_cells(manifest.folder)
    if not cells.n_obs:
        raise InputError(f"{manifest.folder} holds no generated cells")
    if not cells.var.index.equals(genes):
        raise InputError(
            f"{manifest.folder} holds {len(cells.var)} genes and the vocabulary has {len(genes)}: evaluate needs all "
            "of them, in order; generate without generate.genes"
        )
    return cells


def under_new_labels(obs: pd.DataFrame) -> pd.DataFrame:
    """Return obs of perturbed cells with the labels that they were moved to in place of their own.

    A label that was removed is missing.
    """
    moved = {c.removeprefix(TO): obs[c].astype(str).replace("", None) for c in obs if str(c).startswith(TO)}
    return obs.assign(**{label: column.astype("category") for label, column in moved.items()})


def read_generated(cells: Cells, *, max_cells: int, rng: np.random.Generator) -> AnnData:
    """Read at most `max_cells` generated cells, drawn without replacement from all shards; nothing else is read."""
    rows = np.sort(rng.choice(cells.n_obs, min(max_cells, cells.n_obs), replace=False))
    return cells[rows]


@torch.inference_mode()
def decode_cells(
    loaded: LoadedVAE, cells: AnnData, *, n_cells: int, measured: np.ndarray | None = None, seed: int = 0
) -> Decoded:
    """Encode and decode the first cells that have counts (held-out cells are in random order), and draw counts.

    A Gaussian head has means of log1p CP10k, and neither a likelihood of counts nor draws of them.

    Args:
        measured: Genes that were measured in each cell, bool (n, g); all if None.
        seed: Seed of the draws.
    """
    counts = as_counts(cells.X)
    rows = np.flatnonzero(np.diff(counts.indptr))[:n_cells]
    mu, nll, draws = [], [], []
    for start in range(0, len(rows), VAE_BATCH):
        chosen = rows[start : start + VAE_BATCH]
        batch = CellBatch.from_csr(counts[chosen])
        if measured is not None:
            batch = replace(batch, measured=torch.from_numpy(measured[chosen]))
        z = loaded.vae.encode(batch)
        decoded = loaded.vae.decode(z, batch.library_size, measured=batch.measured)
        mu.append(decoded.mu.float().numpy())
        if isinstance(decoded, CountDistribution):
            nll.append(loaded.vae.nll(batch, z).double().numpy())
            draws.append(draw_sparse(decoded, chosen.tolist(), seed=seed))
    if not draws:
        return Decoded(rows, np.concatenate(mu))
    return Decoded(rows, np.concatenate(mu), np.concatenate(nll), sp.vstack(draws, format="csr"))


def training_records(inputs: Mapping[str, Manifest]) -> dict[str, list[dict[str, float]]]:
    """Read metrics.jsonl of the training stages that wrote one."""
    files = {s: Path(inputs[s].folder) / "metrics.jsonl" for s in ("train_vae", "train_flow") if s in inputs}
    return {s: [json.loads(line) for line in f.read_text().splitlines()] for s, f in files.items() if f.is_file()}


def write_outputs(
    folder: Path,
    result: Evaluation,
    pictures: list[Picture],
    *,
    inputs: Mapping[str, Manifest],
    config: EvaluateConfig,
) -> None:
    """Write metrics.json, metrics.csv, classes.csv, figures/*.png and report.html."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / "figures" / f"{picture.name}.png").write_bytes(picture.png)
    write_tables(folder, result)
    report = ReportInputs(
        title="scLDM evaluation",
        verdict=result.verdict,
        notes=result.notes,
        facts=result.facts,
        rows=result.rows,
        baseline_names=list(result.baselines),
        yardstick=NB,
        pictures=pictures,
        provenance=[_provenance(m) for m in inputs.values()],
        reproduce=_reproduce(config, inputs),
        combinations=titled_means(result.combinations),
    )
    write_report(folder / "report.html", report)


def _provenance(manifest: Manifest) -> dict[str, Any]:
    return {
        "stage": manifest.stage,
        "version": manifest.version,
        "seconds": f"{manifest.seconds:.1f}",
        "finished": f"{datetime.fromtimestamp(manifest.finished_at, UTC):%Y-%m-%d %H:%M:%S} UTC",
        "detail": {"config": manifest.config, "inputs": manifest.inputs, "folder": manifest.folder},
    }


def _reproduce(config: EvaluateConfig, inputs: Mapping[str, Manifest]) -> str:
    settings = [f"{k}={json.dumps(v)}" for k, v in config.model_dump(mode="json").items()]
    folders = [f"inputs.{stage}={m.folder}" for stage, m in inputs.items()]
    return f"scldm run jobs/evaluate.yaml {shlex.join([*settings, *folders])}"
