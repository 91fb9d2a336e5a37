"""Methods of `scldm.Model` that compare cells: denoised expression, differences of groups, ways between cells, queries.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import anndata
import pandas as pd

from scldm.api.arguments import Arguments
from scldm.api.methods.core import cells_arguments
from scldm.api.methods.generated import Generated
from scldm.api.methods.real_cells import RealCells
from scldm.api.parts import (
    LATENTS,
    digests,
    latents_of,
    require_counts_head,
)
from scldm.data.align import Match, align
from scldm.flow.config import SamplerConfig
from scldm.generation.decoder_condition import decoder_vectors, refuse_adaln, vectors_digest


class Analyses(RealCells, Generated):
    """Analyses of real cells; the computations are in `scldm.api.analysis`."""

    def normalized_expression(
        self, adata: anndata.AnnData | str | Path, *, library_size: float | str = 1e4,
        only_genes: Sequence[str] | None = None, layer: str | None = None, match: Match = "id",
        genes: str | None = None, max_missing: float = 0.2, decoder_condition: Any = None,
    ) -> anndata.AnnData:  # fmt: skip
        """Return denoised expression: the decoder's means of real cells, at one library size.

        An AnnData and not a table, so that obs and latents come along and scanpy takes it; `.to_df()` is the table. X
        is dense float32, b x (genes kept) x 4 bytes, filled by tiles: only the genes that are kept are stored. The
        means of a cell sum to the library size over all genes of the model. Deterministic. A Gaussian head gives its
        mean of log1p CP10k, has no other library size, and says so in uns["scldm"]["scale"].

        A decoder smooths: a gene follows the genes that it varies with. Use the values to look at cells, and
        `differential_expression` to compare groups of them.

        Args:
            library_size: That all cells get, or "observed": each its own.
            only_genes: Ids or names of the genes to keep; None: all.
            decoder_condition: As in `reconstruct`. Other arguments as in `encode`.

        Raises:
            RequestError: The values do not fit into this machine's memory.

        >>> expression = model.normalized_expression(adata, only_genes=["g1", "g4"])
        >>> expression.shape, expression.var_names.tolist()
        ((70, 2), ['g1', 'g4'])
        >>> bool(np.allclose(model.normalized_expression(adata).X.sum(1), 1e4))
        True
        """
        from scldm.api.analysis.expression import normalized, read_library_size, read_only_genes

        given = Arguments()
        adata, max_missing = cells_arguments(given, adata, layer, match, genes, max_missing)
        size = read_library_size(given, library_size, gaussian=self.vae.vae.config.head == "gaussian")
        kept = read_only_genes(given, only_genes, self.vocabulary)
        given.raise_problems()
        vectors = decoder_vectors(self.vae.vae.config, decoder_condition, adata.n_obs, per="each cell")
        cells = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        about = {"kind": "normalized_expression", **digests(self.folders), **self._numerics().as_plain()}
        return normalized(
            adata, cells, vae=self.vae, library_size=size, kept=kept, vectors=vectors,
            about={**about, **vectors_digest(vectors)},
        )  # fmt: skip

    def differential_expression(
        self, adata: anndata.AnnData | str | Path, groupby: str, group1: Any, group2: Any = None, *,
        method: Literal["posterior", "generated"] = "posterior", evidence: str = "counts",
        library_sizes: str = "matched", delta: float = 1.0,
        n_permutations: int = 1000, n: int = 1000, guidance: Mapping[str, float] | float | None = None,
        sampler: SamplerConfig | Mapping[str, Any] | None = None, seed: int = 0, layer: str | None = None,
        match: Match = "id", genes: str | None = None, max_missing: float = 0.2,
    ) -> pd.DataFrame:  # fmt: skip
        """Compare the expression of two groups of real cells, or of two conditions by generated populations.

        What is claimed. `p_value`, with evidence="counts": that the two groups' populations have the same mean of this
        gene's own counts per 10,000. If both groups are of one population, of any sizes and library sizes, the test is
        exact: at most a share of alpha of genes has p <= alpha, and a discovery at p_adjusted <= alpha
        (Benjamini-Hochberg) occurs in at most that share of comparisons. If other genes differ it holds for many
        cells. `se`, `low`, `high`: an error and a 95 % interval of `log2_fold_change` that hold on average over genes
        of similar expression, not for each gene, as long as the model follows at most half of the noise of a gene's own
        counts. `probability`: of |log2 fold change| > delta, by this error and a flat prior.
        A difference that the training cells did not have is not in what the model gives, only in the counts' columns.

        What is not claimed. Denoising adds no evidence that a gene differs. evidence="denoised" tests denoised
        expression, whose genes move together: of a null comparison none or half of them have p <= 0.05, and if other
        genes differ, most genes that do not are found too. Cells are taken as independent: cells of one donor are
        not, so that a p-value is about these donors' cells.
        Groups that were found by clustering the same cells differ by construction (Zhang et al. 2019), and then no
        p-value is calibrated. method="generated" adds no evidence either: its error is that of the real cells of
        `adata` and of what separates generated from real cells, so that it finds less, however large n is.

        Args:
            groupby: Column of obs. A label of the model for method="generated".
            group1: A class, or a list of classes.
            group2: The same; None: all other cells that have a class.
            method: "posterior": denoised expression of the real cells, at 10,000 molecules. "generated": expression of
                n cells generated under the labels of each group.
            evidence: What p-values of "posterior" are of, "counts" or "denoised".
            library_sizes: "matched": molecules of the deeper group are left out, until both have the same library
                sizes. "own": all are used; more power, and p-values hold for many cells only (with "denoised", not).
            delta: log2 fold change of `probability`.
            n_permutations: Of the groups; the smallest p-values are of a Student distribution scaled to them.
            n: Cells to generate of each group.
            guidance: Of the generation; above 1 it exaggerates differences, which is in the error.
            sampler: Of the generation.
            seed: Seed of permutations, molecules left out, and generated cells. Other arguments as in `encode`.

        Returns:
            A row of each gene, small p-values first: gene, mean1, mean2 (counts per 10,000, by the model),
            log2_fold_change = log2((mean1 + 1) / (mean2 + 1)), se, low, high, counts_log2_fold_change (the same of
            the gene's own counts), p_value, p_adjusted, probability. attrs["scldm"] says how it was computed.

        Raises:
            ArgumentError: Arguments cannot be used; all are listed.

        >>> table = model.differential_expression(adata, "donor", "d1", "d_2")
        >>> table.loc["g2", ["mean1", "mean2", "p_adjusted"]].notna().all()
        True
        """
        from scldm.api.analysis.differential import compare_cells, read_comparison
        from scldm.api.analysis.generated_de import compare_generated, read_generated

        require_counts_head(self.vae, self.folders)
        refuse_adaln(self.vae.vae.config, "differential_expression")
        given = Arguments()
        adata, max_missing = cells_arguments(given, adata, layer, match, genes, max_missing)
        given.one_of("method", method, ("posterior", "generated"))
        if method == "generated":
            self._require_flow("cells come from one")
            n = read_generated(given, groupby, n, self.vocabulary)
        how = read_comparison(
            given, adata, groupby, group1, group2, evidence=evidence, library_sizes=library_sizes, delta=delta,
            n_permutations=n_permutations, seed=seed,
        )  # fmt: skip
        both = adata[how.first | how.second]
        first = how.first[how.first | how.second]
        cells = align(both, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        numerics = self._numerics()
        if method == "posterior":
            table = compare_cells(both, cells, first, how, vae=self.vae)
        else:
            table = compare_generated(
                both, cells, first, how, n, vae=self.vae,
                generate=lambda asked, seed: self.generate(asked, guidance=guidance, sampler=sampler, seed=seed,
                                                           library_size=1e4),
            )  # fmt: skip
        table.attrs["scldm"] |= {"method": method, "seed": how.seed, **digests(self.folders), **numerics.as_plain()}
        return table

    def interpolate(
        self, a: Any, b: Any, *, n: int = 7, cells: int = 1, library_size: float = 1e4,
        guidance: Mapping[str, float] | float | None = None, seed: int = 0,
        sampler: SamplerConfig | Mapping[str, Any] | None = None, unknown_labels: str = "error",
        layer: str | None = None, match: Match = "id", genes: str | None = None, max_missing: float = 0.2,
    ) -> anndata.AnnData:  # fmt: skip
        """Return cells on the way from cells to cells, or from a condition to a condition.

        The way is through the flow's noise, along the arc between the noises of the two cells, and under a velocity
        that is mixed between their labels: latents in the middle of a straight line are no cells. Between conditions
        the noise is one and only the velocity changes; either end is then what `generate` makes of that noise. It is a
        way through what the model holds for cells, not a course in time.

        Args:
            a: Cells (AnnData or path) with the labels of the model in obs; or a condition, {label: class}.
            b: As many cells as `a` or one (or `a` is one); or a condition.
            n: Places of each way, both ends included.
            cells: Ways between two conditions.
            library_size: Of all cells, so that only the composition changes on the way.
            guidance: Of the integration; None: the sampler's.
            sampler: Settings; None: {"solver": "midpoint", "steps": 20}.
            unknown_labels: "error", or "none": use cells that lack a label without it.
            seed: Seed of counts, and of noise between conditions. Other arguments as in `encode`.

        Returns:
            AnnData, way after way: X CSR int32 counts drawn from the decoder, layers["mean"] its means, dense float32,
            obsm["X_scldm"] (at the ends the cells' own latents), and in obs `pair`, `place` in 0 .. 1, `from`, `to`.

        Raises:
            RequestError: Arguments cannot be used; all are listed.

        >>> way = model.interpolate({"cell_type": "B"}, {"cell_type": "NK"}, n=3)
        >>> way.obs["place"].tolist()
        [0.0, 0.5, 1.0]
        >>> model.interpolate(adata[:4], adata[4], n=5).shape
        (20, 6)
        """
        from scldm.api.analysis.interpolation import End, interpolated, paired, read_condition, read_path
        from scldm.api.perturb import UNKNOWN, own_classes

        flow, given = self._require_flow("the way between cells is through its noise"), Arguments()
        refuse_adaln(self.vae.vae.config, "interpolate")
        given.one_of("unknown_labels", unknown_labels, UNKNOWN)
        cells, library_size = (
            given.whole("cells", cells, least=1), given.number("library_size", library_size, above=0.0),
        )  # fmt: skip
        how = read_path(given, n, guidance, sampler, seed, flow=flow, weights=self.weights)
        ends: list[End] = []
        for name, end in (("a", a), ("b", b)):
            if isinstance(end, Mapping):
                ends.append(read_condition(given, name, end, cells, flow))
                continue
            adata, max_missing = cells_arguments(given, end, layer, match, genes, max_missing, name=name)
            if not given.problems:
                own = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
                ids = own_classes(adata, self.vocabulary, None, flow, unknown_labels)
                ends.append(End(list(map(str, adata.obs_names)), ids, own, adata))
        given.raise_problems()
        about = {"kind": "interpolate", "seed": how.seed, "sampler": how.sampler.model_dump_json(),
                 **digests(self.folders), **self._numerics(how.sampler).as_plain()}  # fmt: skip
        return interpolated(paired(*ends), how, vae=self.vae, flow=flow, library_size=library_size, about=about)

    def map(
        self, query: anndata.AnnData | str | Path, *, reference: anndata.AnnData | str | Path | None = None,
        labels: Sequence[str] | str | None = None, novel_above: float = 0.95, layer: str | None = None,
        reference_layer: str | None = None, match: Match = "id", genes: str | None = None, max_missing: float = 0.2,
        seed: int = 0,
    ) -> anndata.AnnData:  # fmt: skip
        """Map query cells to a reference: their latents, and the reference's labels with calibrated probabilities.

        The classifier is logistic regression on latents; its temperature is fitted to reference cells that it did not
        see. Probabilities hold for cells such as the reference's: look at `novelty` first.

        Args:
            query: Cells with raw counts; modified and returned as by `encode`.
            reference: Cells with labels in obs and raw counts, such as the model was trained on. None: the cells that
                the pipeline trained the model on, if the model is in the pipeline's folder.
            labels: obs columns of the reference; None: the labels of the model that it has.
            novel_above: Novelty above which a cell is called novel; 1 - novel_above of cells such as the reference's.
            layer: Layer of the query's counts; reference_layer: of the reference's. Other arguments as in `encode`, for
                both.
            seed: Deals reference cells to the folds of the cross-fit, and draws 20,000 of more.

        Returns:
            The query with obsm["X_scldm"] and in obs, for each label, `mapped_<label>` (the reference's categories) and
            `mapped_<label>_probability`; `novelty` in 0 .. 1, the share of reference cells that lie less apart from the
            others; and `is_novel`. uns["scldm_mapping"] holds temperature, accuracy and calibration error of reference
            cells that were left out, by label.

        Raises:
            ArgumentError: Arguments, or the reference's labels, cannot be used; all are listed.
            CellsError: The model cannot use the query or the reference.
            CheckpointError: No reference is given, and the model is not in the folder of its pipeline.

        >>> query = model.map(adata[:5], reference=adata)
        >>> query.obs["mapped_cell_type"].cat.categories.tolist()
        ['B', 'NK', 'T']
        """
        from scldm.api.analysis import mapping

        given = Arguments()
        query, max_missing = cells_arguments(given, query, layer, match, genes, max_missing, name="query")
        source = None if reference is None else given.anndata("reference", reference)
        given.text("reference_layer", reference_layer)
        novel_above, seed = given.number("novel_above", novel_above, within=(0.0, 1.0)), given.seed(seed)
        wanted = mapping.read_labels(given, query, source, labels, vocabulary=self.vocabulary)
        given.raise_problems()
        sets = {"query": (query, layer)} | ({} if source is None else {"reference": (source, reference_layer)})
        known = mapping.trained_on(self.folders, wanted) if source is None else None
        cells = mapping.aligned(sets, self.vocabulary, match=match, genes=genes, max_missing=max_missing)
        out = self._with_latents(query, cells["query"])
        if known is None:
            assert source is not None  # one of both is there
            z = latents_of(self.vae, cells["reference"], source)
            known = mapping.Reference(z, {name: mapping.categories_of(source.obs[name]) for name in wanted})
        mapping.write_mapping(out, out.obsm[LATENTS], known, novel_above=novel_above, seed=seed)
        return out
