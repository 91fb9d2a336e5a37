"""Inspect a source for `scldm init`, in a child process as `scldm validate-data` does.

Counts may be in X or elsewhere, and genes may be named by the index of var or by a column. The first place that holds
only counts and the first column of unique Ensembl ids are taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.findings import Examined
    from pipeline.data.inspection.examine import Question

CHILD = "from pipeline.cli.init.inspect import child; child()"
NAMED_COUNTS = ("counts", "raw_counts", "umi", "umis", "raw")  # layers that are tried first


@dataclass(frozen=True)
class SourceSummary:
    """A summary of a source as plain data. Names in it are untrusted."""

    uri: str
    kind: str  # h5ad, 10x, SOMA
    n_files: int
    n_cells: int
    n_genes: int
    layer: str | None  # where the counts are, as ingest.source.layer
    gene_id: str | None  # as ingest.source.gene_id
    gene_name: str | None  # as ingest.source.gene_name
    values_are: str | None  # None: the counts were not read
    n_stored: int | None  # non-zeros, if they were read
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)  # of obs, as `obs_profile`
    other_places: tuple[str, ...] = ()  # other places with whole numbers, as setting text
    warnings: tuple[str, ...] = ()


def inspect_source(question: Question) -> dict[str, Any]:
    """Return a `SourceSummary` as plain data, or {"errors": [...]} if the source cannot be used."""
    from dataclasses import replace

    from pipeline.data.inspection.examine import examine

    question = replace(question, profile=True)
    found = examine(question)
    layer = question.layer
    if any(f.errors for f in found) and layer is None and question.counts and found[0].kind == "h5ad":
        layer, found = _elsewhere(question, found)
    gene_id = question.gene_id or _gene_id(found)
    if gene_id is not None and gene_id != question.gene_id:
        named = examine(replace(question, layer=layer, gene_id=gene_id, counts=False))
        if any(f.errors for f in named):
            gene_id = None
        elif any(f.errors for f in found):  # of the index, which is then not used
            found = examine(replace(question, layer=layer, gene_id=gene_id))
        else:
            _speak_of_names(found, named)
    errors = [f"{_where(found, e)}{f.text()}" for e in found for f in e.errors]
    if errors:
        return {"errors": errors}
    return asdict(_summarise(question.uri, found, layer, gene_id))


def _speak_of_names(found: list[Examined], named: list[Examined]) -> None:
    """Report problems of gene ids for the chosen column and not for the index."""
    of_genes = lambda f: "gene ids" in f.what  # noqa: E731
    for one, other in zip(found, named, strict=True):
        kept = [f for f in one.findings if not of_genes(f)]
        one.findings[:] = [*kept, *(f for f in other.findings if of_genes(f))]


def _elsewhere(question: Question, found: list[Examined]) -> tuple[str | None, list[Examined]]:
    """Return the first layer without errors and its findings; X if no layer is valid."""
    from dataclasses import replace

    from pipeline.data.inspection.examine import examine

    places = [p.removeprefix("layer: ") for p in found[0].facts.get("profile", {}).get("places", ())]
    for layer in sorted((p for p in places if p != "null"), key=_preference):
        other = examine(replace(question, layer=layer))
        if not any("values" in f.what for e in other for f in e.errors) and "values are" in other[0].facts:
            return layer, other
    return None, found


def _preference(layer: str) -> tuple[int, str]:
    return (NAMED_COUNTS.index(layer.lower()) if layer.lower() in NAMED_COUNTS else len(NAMED_COUNTS), layer)


def _gene_id(found: list[Examined]) -> str | None:
    """Return a var column, present in all files, that holds better gene ids than the index."""
    profiles = [v for e in _files(found) if (v := e.facts.get("profile", {}).get("var"))]
    if not profiles or all(p["index_is_ensembl"] and p["index_is_unique"] for p in profiles):
        return None
    shared = _in_all([p["ensembl"] for p in profiles])
    if not shared and not all(p["index_is_unique"] for p in profiles):
        shared = _in_all([p["unique"] for p in profiles])
    return shared[0] if shared else None


def _gene_name(found: list[Examined], gene_id: str | None) -> str | None:
    """Return the var column of gene symbols; None if the index holds them."""
    profiles = [v for e in _files(found) if (v := e.facts.get("profile", {}).get("var"))]
    if not profiles or (gene_id is not None and not profiles[0]["index_is_ensembl"]):
        return None
    names = ("feature_name", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "symbol", "Symbol")
    texts = _in_all([p["texts"] for p in profiles])
    return next((n for n in names if n in texts), None)


def _summarise(uri: str, found: list[Examined], layer: str | None, gene_id: str | None) -> SourceSummary:
    files = _files(found)
    facts = [e.facts for e in files]
    counted = all("values are" in f for f in facts)
    warnings = dict.fromkeys(f"{_where(found, e)}{w.text()}" for e in found for w in e.findings if w.level == "warning")
    places = [p for p in facts[0].get("profile", {}).get("places", ()) if p != f"layer: {layer or 'null'}"]
    return SourceSummary(
        uri=uri,
        kind=files[0].kind,
        n_files=len(files),
        n_cells=sum(int(f["cells"]) for f in facts),
        n_genes=_n_genes(files),
        layer=layer,
        gene_id=gene_id,
        gene_name=_gene_name(found, gene_id),
        values_are=facts[0]["values are"] if counted else None,
        n_stored=sum(int(f["stored values"]) for f in facts) if counted else None,
        columns=_columns([f.get("profile", {}).get("obs", {}) for f in facts]),
        other_places=tuple(places),
        warnings=tuple(warnings),
    )


def _n_genes(files: list[Examined]) -> int:
    """Return the number of genes of all files together, which are matched by id."""
    if len(files) == 1:
        return int(files[0].facts["genes"])
    from pipeline.data.tables import plain_id

    return len({plain_id(x) for e in files for x in e.gene_ids or ()})


def _columns(profiles: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the columns that all files have.

    Classes are not compared between files, so numbers are bounds; but files that hold one class each are counted, since
    users often save one file for each donor or treatment.
    """
    if len(profiles) == 1:
        return profiles[0]
    joined = {}
    for column in _in_all([list(p) for p in profiles]):
        all_files = [p[column] for p in profiles]
        joined[column] = all_files[0] | {
            "n_missing": sum(p["n_missing"] for p in all_files),
            "n_classes": max(p["n_classes"] for p in all_files),
            "smallest": max(p["smallest"] for p in all_files),
            "largest": sum(p["largest"] for p in all_files),
        }
        joined[column]["numbers"] = _joined_range([p["numbers"] for p in all_files])
        if all(p["only"] is not None for p in all_files):
            joined[column] |= _of_single_classes(all_files)
    return joined


def _joined_range(ranges: list[Any]) -> Any:
    """Return the range of a column of numbers over all files; None if it holds something else in one."""
    if any(r is None for r in ranges):
        return None
    positive = [r[1] for r in ranges if r[1] is not None]
    return [min(r[0] for r in ranges), min(positive, default=None), max(r[2] for r in ranges)]


def _of_single_classes(profiles: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a column that has one class in each file."""
    cells: Counter[str] = Counter()
    for p in profiles:
        cells[p["only"]] += p["largest"]
    sizes = sorted(cells.values())
    one = profiles[0]["only"] if len(sizes) == 1 else None
    return {"n_classes": len(sizes), "smallest": sizes[0], "middle": sizes[len(sizes) // 2], "largest": sizes[-1],
            "only": one, "same_as": None}  # fmt: skip


def _files(found: list[Examined]) -> list[Examined]:
    """Return the results of single files, without the one about all files together."""
    return [e for e in found if e.kind in ("h5ad", "10x", "SOMA")] or found[:1]


def _where(found: list[Examined], one: Examined) -> str:
    from scldm.text import shown

    return f"{shown(one.where, 200)}: " if len(found) > 1 else ""


def _in_all(lists: Iterable[list[str]]) -> list[str]:
    first, *others = lists
    return [x for x in first if all(x in other for other in others)]


def child() -> None:
    """Run the child process: read a question from stdin, write the answer to a file."""
    from pipeline.data.inspection.examine import examine as examine  # before the limit on memory: libraries are mapped
    from pipeline.data.inspection.sandbox import serve

    serve(inspect_source)
