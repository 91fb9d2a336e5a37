"""What validate-data, init and ingest answer about a case, and where they disagree.

They are compared with each other, and with a plain reading of the same files (`plain.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml

from helpers.files.corpus.case import Written
from helpers.files.corpus.plain import PlainCells, read_plain
from pipeline.cli.init.inspect import SourceSummary, inspect_source
from pipeline.cli.init.job import Wanted, make_job
from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.findings import Examined, Finding
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.inspection.examine import examine
from pipeline.data.labels import label_names
from pipeline.data.sources.open import open_source
from pipeline.stages import ingest
from scldm.errors import InputError

MENDED = {"missing_label": "ingest.missing_label: drop", "columns": "ingest.source.columns"}  # settings, in remedies


@dataclass(frozen=True)
class Reading:
    """What the source of a job holds, as `open_source` would write it to SOMA."""

    obs: pd.DataFrame
    var: pd.DataFrame
    counts: sp.csr_matrix


@dataclass(frozen=True)
class Answers:
    """What each part said.

    Attributes:
        errors: Errors of validate-data, without those that the settings of the case mend.
        ingested: The output of ingest, what it reads before it writes it to SOMA, or its refusal.
        job: ingest of the job file that init wrote, or its refusal.
    """

    written: Written
    validated: list[Examined]
    errors: list[Finding]
    ingested: Manifest | Reading | str
    summary: SourceSummary | None
    job: dict[str, Any] | str

    @property
    def expected(self) -> bool:
        """Whether the case is usable."""
        known = self.written.case.usable
        return not self.errors if known is None else known


def ask_all(written: Written, folder: Path, *, whole: bool = True) -> Answers:
    """Ask every part about the files of a case.

    Args:
        folder: Where ingest writes; exists and is empty.
        whole: Whether to run the whole stage, or only what reads and checks the source, which is four times as fast.
    """
    columns = written.source.get("columns", {})
    question = replace(written.question, labels=tuple(columns.get(x, x) for x in written.case.labels))
    validated = examine(question)
    given = {**written.case.config, **written.case.source}
    mended = [words for setting, words in MENDED.items() if setting in given]
    errors = [f for e in validated for f in e.errors if not any(words in f.remedy for words in mended)]
    if len(validated) > 1 and errors == [f for f in validated[-1].errors if "files have errors" in f.what]:
        errors = []  # the files' own errors are mended
    summary, job = _init(written, question.labels)
    ingested = (run_ingest if whole else read_source)(written.config, folder)
    return Answers(written, validated, errors, ingested, summary, job)


def run_ingest(config: IngestConfig, folder: Path) -> Manifest | str:
    """Run the stage in this process; return its manifest, or why it refused."""
    try:
        facts = ingest.run(config, StageContext(folder, {}, 0, SimpleNamespace(), None))
    except InputError as error:
        return str(error)
    return Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0)


def read_source(config: IngestConfig, folder: Path) -> Reading | str:
    """Read and check a source as ingest does, without writing it; return why it was refused."""
    kept: list[Reading] = []

    def keep(folder: Path, obs: pd.DataFrame, var: pd.DataFrame, chunks: Iterable[sp.csr_matrix]) -> None:
        kept.append(Reading(obs, var, sp.vstack([c.astype(np.float32) for c in chunks], format="csr")))

    try:
        with patch("pipeline.data.sources.open.write_experiment", keep):
            open_source(config, folder, config.labels)
    except InputError as error:
        return str(error)
    return kept[0]


def _init(written: Written, labels: tuple[str, ...]) -> tuple[SourceSummary | None, dict[str, Any] | str]:
    """Return what `scldm init` finds, and ingest of the job that it writes."""
    found = inspect_source(replace(written.question, labels=(), missing_text=()))
    if "errors" in found:
        return None, "\n".join(found["errors"])
    summary = SourceSummary(**found)
    # init wants two classes, and it does not rename columns.
    asked = [
        x for x in labels if summary.columns.get(x, {}).get("n_classes") != 1 and "columns" not in written.case.source
    ]
    names = ("layer", "gene_id", "obs", "genome", "measurement")
    given = {name: written.source.get(name) for name in names} | {"region": None, "anonymous": False}
    try:
        text, _ = make_job(summary, Wanted("corpus", Path("corpus.yaml"), "scldm init", given, asked))
    except InputError as error:
        return summary, str(error)
    return summary, yaml.safe_load(text)["ingest"]


# ---- differences -------------------------------------------------------------------------------------------------
def differences(answers: Answers, folder: Path) -> list[str]:
    """Return every disagreement, as text; empty if all agree.

    Args:
        folder: Where ingest may write once more; exists and is empty.
    """
    usable = answers.expected
    refusal = answers.ingested if isinstance(answers.ingested, str) else None
    found = []
    if usable == bool(answers.errors):
        found.append(f"validate-data: {[f.text() for f in answers.errors] or 'usable'}")
    if usable != (refusal is None):
        found.append(f"ingest: {refusal or 'reads it'}")
    found += _of_init(answers, folder)
    if usable and not found:
        plain = read_plain(answers.written)
        found += [*_of_validation(answers, plain), *_of_summary(answers, plain)]
        if isinstance(answers.ingested, Manifest):
            found += _of_ingest(answers.written, answers.ingested, plain)
        elif isinstance(answers.ingested, Reading):
            found += _of_reading(answers.written, answers.ingested, plain)
    return found


def _of_init(answers: Answers, folder: Path) -> Iterator[str]:
    """Yield what init writes although ingest refuses it, and what it refuses although ingest takes it."""
    if isinstance(answers.job, str):
        if answers.expected:
            yield f"init: {answers.job}"
        return
    config = IngestConfig.model_validate(answers.job)
    if answers.expected and config.source == answers.written.config.source:
        return
    if config.source.type != "soma" and isinstance(refusal := read_source(config, folder), str):
        yield f"init writes a job that ingest refuses: {refusal}"


def _of_validation(answers: Answers, plain: PlainCells) -> Iterator[str]:
    *_, whole = answers.validated
    files = answers.validated[:-1] or [whole]
    columns = answers.written.source.get("columns", {})
    yield from _unequal("validate-data: cells", whole.facts["cells"], plain.counts.shape[0])
    genes = {g for one in files for g in one.gene_ids or ()}
    if len(files) == 1:
        yield from _unequal("validate-data: genes", whole.facts["genes"], len(plain.genes))
        if not any("come twice" in f.what for f in whole.findings):
            yield from _unequal("validate-data: largest count", whole.facts["largest value"], plain.counts.max())
    elif not any("." in g for g in genes):
        yield from _unequal("validate-data: genes", sorted(genes), sorted(plain.genes))
    for label in plain.labels:
        counted: Counter[str] = Counter()
        for one in files:
            counted.update(one.facts["classes"].get(columns.get(label, label), {}))
        yield from _unequal(f"validate-data: classes of {label}", dict(counted), classes(plain.labels[label]))


def _of_summary(answers: Answers, plain: PlainCells) -> Iterator[str]:
    summary = answers.summary
    assert summary is not None
    yield from _unequal("init: cells and genes", (summary.n_cells, summary.n_genes), plain.counts.shape)
    if summary.n_files > 1 or answers.written.case.config.get("missing_text") is not None:
        return
    columns = answers.written.source.get("columns", {})
    for label in plain.labels:
        if (profile := summary.columns.get(columns.get(label, label))) is None:
            yield f"init: no column {label}"
            continue
        sizes = classes(plain.labels[label])
        yield from _unequal(f"init: classes of {label}", profile["n_classes"], len(sizes))
        yield from _unequal(f"init: largest class of {label}", profile["largest"], max(sizes.values()))
        yield from _unequal(f"init: gaps in {label}", profile["n_missing"], int(plain.labels[label].isna().sum()))


def _of_reading(written: Written, reading: Reading, plain: PlainCells) -> Iterator[str]:
    yield from _unequal("ingest: genes", sorted(reading.var["feature_id"]), sorted(plain.genes))
    yield from _unequal("ingest: cells", len(reading.obs), plain.counts.shape[0])
    for label in plain.labels:
        names = label_names(reading.obs[label], written.config.missing_text)
        yield from _unequal(f"ingest: {label} of each cell", list(names), list(plain.labels[label]))
    if reading.counts.shape == plain.counts.shape:
        order = pd.Index(plain.genes).get_indexer(list(reading.var["feature_id"]))
        changed = reading.counts.astype(np.float64) != plain.counts[:, order]
        yield from _unequal("ingest: counts that differ", changed.nnz, 0)


def _of_ingest(written: Written, manifest: Manifest, plain: PlainCells) -> Iterator[str]:
    data, facts = IngestedDataset.open(manifest), manifest.facts
    kept = plain.kept(drop=written.config.missing_label == "drop")
    yield from _unequal("ingest: cells", sum(facts["n_cells"].values()), kept.counts.shape[0])
    yield from _unequal("ingest: genes", sorted(data.vocabulary.feature_ids), sorted(kept.genes))
    if len(data.cells) != kept.counts.shape[0] or len(data.vocabulary.feature_ids) != len(kept.genes):
        return
    for label in kept.labels:
        sizes = {name: sum(n.values()) for name, n in facts["label_counts"][label].items()}
        yield from _unequal(f"ingest: classes of {label}", sizes, classes(kept.labels[label]))
        names = np.asarray(data.vocabulary.label(label).classes, dtype=object)[data.cells[f"label:{label}"]]
        yield from _unequal(f"ingest: {label} of each cell", list(names), list(kept.labels[label]))
    order = pd.Index(kept.genes).get_indexer(list(data.vocabulary.feature_ids))
    expected = sp.csr_matrix(kept.counts[:, order])
    sums = np.asarray(expected.sum(1)).ravel().astype(np.float32)  # as library sizes are kept
    yield from _unequal("ingest: sums of cells", data.cells["library_size"].tolist(), sums.tolist())
    table = data.all_blocks().read(data.cells["soma_joinid"].to_numpy()).combine_chunks()
    gene, count = table["gene"].combine_chunks(), table["count"].combine_chunks()
    parts = (count.flatten().to_numpy().astype(np.float64), gene.flatten().to_numpy(), gene.offsets.to_numpy())
    changed = sp.csr_matrix(parts, shape=expected.shape) != expected
    yield from _unequal("ingest: counts that differ", changed.nnz, 0)


def classes(column: pd.Series) -> dict[str, int]:
    """Return the number of cells of each class."""
    return dict(Counter(x for x in column if x is not None))


def _unequal(what: str, ours: Any, plain: Any) -> Iterator[str]:
    if ours != plain:
        yield f"{what}: {str(ours)[:300]}; plainly {str(plain)[:300]}"
