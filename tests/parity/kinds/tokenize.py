"""Recorded gene sampling, vocabularies, splits and size factors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parity.case import Case, CaseError
from parity.kinds.upstream_tokens import gene_tokens, split_cells, split_files, tokenise
from parity.ledger import Ledger
from parity.tolerance import CLOSED_FORM, EXACT
from scldm.checkpoints.untrusted.reader import read_pickle
from scldm.data.vocabulary import LabelVocabulary


def matches(case: Case) -> bool:
    return "var_names" in case.facts and "cases" in case.facts


def files(case: Case) -> list[Path]:
    """Return files to which the case refers: those it names, and files of the same data set in the same folder."""
    named = [case.folder / case.facts[key] for key in ("metadata_json", "metadata_genes") if case.facts.get(key)]
    return [*named, *(path for key in FACTORS for path in _same_folder(case, key))]


# Files in the folder of the metadata of a data set NAME: NAME + these.
FACTORS = {
    "mu": "_log_size_factor_mu.pkl",
    "sd": "_log_size_factor_sd.pkl",
    "joint_mu": "_joint_mu.pkl",
    "joint_sd": "_joint_sd.pkl",
    "joint_metadata": "_joint_metadata.json",
}


def _same_folder(case: Case, key: str) -> list[Path]:
    metadata = case.folder / case.fact("metadata_json")
    path = metadata.with_name(metadata.name.removesuffix("_metadata.json") + FACTORS[key])
    return [path] if path.is_file() else []


def _file(case: Case, key: str) -> Path:
    found = _same_folder(case, key)
    if not found:
        raise CaseError(f"no file *{FACTORS[key]} beside {case.fact('metadata_json')}")
    return found[0]


def check(case: Case, ledger: Ledger) -> None:
    metadata = _metadata(case.folder / ledger.fact("metadata_json"))
    genes, means = _gene_table(case, ledger, metadata)
    tokens = gene_tokens(ledger.fact("var_names"), genes)
    ledger.value("n_genes", len(genes), ledger.fact("n_genes"), EXACT)
    if "out/encode_genes" in case.tensors:
        ledger.tensor("out/encode_genes", torch.from_numpy(tokens), EXACT)
    _check_tokens(case, ledger, tokens, means)
    _check_errors(case, ledger, tokens, means)
    _check_labels(ledger, metadata)
    for statistic in ("mu", "sd"):
        _check_size_factors(case, ledger, metadata, statistic)
    if "joint" in case.facts:
        _check_joint(case, ledger)
    _check_splits(case, ledger)


def _metadata(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _gene_table(case: Case, ledger: Ledger, metadata: Mapping[str, Any]) -> tuple[list[str], np.ndarray | None]:
    """Return the genes of the vocabulary in order, and their mean counts if there is a table of them."""
    if not case.facts.get("metadata_genes"):
        return list(metadata["genes"]), None
    import pandas as pd

    table = pd.read_parquet(case.folder / ledger.fact("metadata_genes"))
    means = table["means"].to_numpy() if "means" in table else None
    return [str(gene) for gene in table["feature_id"]], means


def _check_tokens(case: Case, ledger: Ledger, tokens: np.ndarray, means: np.ndarray | None) -> None:
    counts, length = case.tensors["in/counts"].numpy(), int(ledger.fact("genes_seq_len"))
    for run in ledger.fact("cases"):
        ours = tokenise(counts, tokens, mode=run["mode"], length=run["genes_seq_len"], seed=run["seed"], means=means)
        for name in run["out"]:
            ledger.tensor(f"out/{run['key']}/{name}", torch.from_numpy(getattr(ours, name)), EXACT)
    for key in case.under("out/"):
        if match := re.fullmatch(r"(\w+)_int64/(\w+)", key):
            ours = tokenise(counts.astype(np.int64), tokens, mode=match[1], length=length, seed=0, means=means)
            ledger.tensor(f"out/{key}", torch.from_numpy(getattr(ours, match[2])), EXACT)


def _check_errors(case: Case, ledger: Ledger, tokens: np.ndarray, means: np.ndarray | None) -> None:
    counts = case.tensors["in/counts"].numpy()
    for name, recorded in (ledger.fact("errors") if "errors" in case.facts else {}).items():
        mode, _, length = name.partition("/L")
        if mode == "all":
            ledger.fault(
                f"errors/{name}", f"upstream lacks a mode that its configuration names: {recorded}", "all genes"
            )
            continue
        try:
            tokenise(counts, tokens, mode=mode, length=int(length), seed=0, means=means)
            ours = "no error"
        except ValueError:
            ours = "ValueError"
        ledger.same(f"errors/{name}", ours, recorded.partition(":")[0])


def _vocabularies(metadata: Mapping[str, Any]) -> dict[str, LabelVocabulary]:
    return {name: LabelVocabulary(name, tuple(map(str, values))) for name, values in metadata["labels"].items()}


def _check_labels(ledger: Ledger, metadata: Mapping[str, Any]) -> None:
    """Ids of the classes in their order; upstream's id of an unknown class is None."""
    labels = _vocabularies(metadata)
    for name, size in ledger.fact("classes").items():
        ledger.value(f"classes/{name}", len(labels[name].classes), size, EXACT)
    for name, recorded in ledger.fact("encode_metadata").items():
        known = [i for i in recorded if i is not None]
        ledger.value(f"encode_metadata/{name}", labels[name].encode(labels[name].classes), known, EXACT)
        if len(known) < len(recorded):
            ledger.fault(f"encode_metadata/{name}/unknown class", "upstream goes on with None", "UnknownNameError")


def _check_size_factors(case: Case, ledger: Ledger, metadata: Mapping[str, Any], statistic: str) -> None:
    fact = f"{statistic}_size_factor_indexed"
    if fact not in case.facts:
        return
    factors, labels = read_pickle(_file(case, statistic)), _vocabularies(metadata)
    for label, recorded in ledger.fact(fact).items():
        ours = {str(labels[label].encode([name])[0]): value for name, value in factors[label].items()}
        ledger.same(f"{fact}/{label} ids", sorted(ours), sorted(recorded))
        ids = sorted(set(ours) & set(recorded))
        ledger.value(f"{fact}/{label}", [ours[i] for i in ids], [recorded[i] for i in ids], CLOSED_FORM)


def _check_joint(case: Case, ledger: Ledger) -> None:
    """Size factors of pairs of classes, whose names upstream joins by an underscore."""
    recorded, labels = ledger.fact("joint"), _vocabularies(_metadata(_file(case, "joint_metadata")))
    components = recorded["joint_components"]
    ledger.same("joint/components", list(case.facts["classes"]), components)
    ledger.same("joint/key", "_".join(components), recorded["joint_key"])
    factors = {name: read_pickle(_file(case, f"joint_{name}"))[recorded["joint_key"]] for name in ("mu", "sd")}
    first, second = (labels[name] for name in components)
    pairs = {
        f"{i}_{j}": f"{one}_{other}"
        for i, one in enumerate(first.classes)
        for j, other in enumerate(second.classes)
        if f"{one}_{other}" in factors["mu"]
    }
    ledger.same("joint/joint_idx_2_classes", pairs, recorded["joint_idx_2_classes"])
    for name, values in factors.items():
        theirs = recorded[name][recorded["joint_key"]]
        ledger.same(f"joint/{name} classes", sorted(values), sorted(theirs))
        shared = sorted(set(values) & set(theirs))
        ledger.value(f"joint/{name}", [values[i] for i in shared], [theirs[i] for i in shared], CLOSED_FORM)


def _check_splits(case: Case, ledger: Ledger) -> None:
    cells = ledger.fact("inmemory_val_split")
    _check_split(ledger, "inmemory_val_split", split_cells, cells["n_cells"], cells["seed"], cells)
    for n, recorded in ledger.fact("train_val_split_list").items():
        # Its seed is not recorded; upstream's data module has one, which is that of its cells.
        _check_split(ledger, f"train_val_split_list/{n}", split_files, int(n), cells["seed"], recorded)


def _check_split(
    ledger: Ledger,
    name: str,
    split: Callable[[int, int], tuple[list[int], list[int]]],
    n: int,
    seed: int,
    recorded: Mapping[str, Sequence[int]],
) -> None:
    if not int(0.1 * n):
        ledger.fault(name, f"a tenth of {n} is none: upstream then validates on what it should train on", "an error")
        return
    for part, ids in zip(("train", "val"), split(n, seed), strict=True):
        ledger.value(f"{name}/{part}", ids, recorded[part], EXACT)
