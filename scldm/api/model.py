"""The model in a notebook: AnnData in, AnnData out.

    model = scldm.load("runs/demo")
    model.encode(adata)                                             # obsm["X_scldm"]
    cells = model.generate({"cell_type": "B cell"}, n=500, seed=0)  # AnnData
    scldm.score(cells, real=adata, label="cell_type")

Networks, tiles and counters are those of the batch jobs: with equal models, sampler, seed and request the cells equal
those of `scldm run jobs/generate.yaml`, bit for bit (on the same processor with as many threads). The randomness of a
real cell is a function of (seed, its row); in a job on the same `.h5ad`, the row is the soma_joinid.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scldm.api.arguments import Arguments
from scldm.api.conditions import Conditions, library_size_argument, read_conditions, sampler_settings
from scldm.api.folders import ModelFolders, Weights, find_models
from scldm.api.hub.local_or_hub import pretrained_folder
from scldm.api.parts import (
    LATENTS,
    check_fits,
    digests,
    each_batch,
    flat,
    latents_of,
    made_cells,
    require_counts_head,
    source_of,
    told,
)
from scldm.checkpoints.asked_values import value_notes, with_values
from scldm.checkpoints.native import LoadedFlow, LoadedVAE, load_flow, load_vae
from scldm.data.align import AlignedCells, Match, align, class_ids
from scldm.data.batch import CellBatch
from scldm.data.vocabulary import Vocabulary
from scldm.errors import CheckpointError
from scldm.flow.config import SamplerConfig
from scldm.flow.transport import generation_start_problem
from scldm.generation.cell_maker import CellMaker, check_pair, distilled_problems
from scldm.generation.decoder_condition import decoder_vectors, refuse_adaln, vectors_digest
from scldm.generation.expression_draw import expression_problems, expression_setting_problem
from scldm.generation.real_cells import draw_sparse, latent_log_prob, require_whole_flow
from scldm.generation.recipe import generated_obs, named_after, recipe_of
from scldm.generation.request import Request, Settings
from scldm.generation.request_table import RequestError
from scldm.generation.tile_threads import each_tile
from scldm.nn.kernels.precision import PRECISIONS, Numerics, Precision, PrecisionError, resolve, set_precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scldm.api.training_run import Report


def load(
    folder: str | Path,
    *,
    flow: str | Path | None = None,
    weights: Weights = "ema",
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
) -> Model:
    """Load the models of a folder.

    Args:
        folder: A model folder, a folder with vae/ and flow/, a finished stage, or a pipeline (its newest flow).
        flow: Model folder of a flow, if it is not in the VAE's folder.
        weights: "ema", the averaged weights of the flow, or "raw".
        device: For example "cuda"; "auto": a GPU if there is one.
        precision: Of the networks' products: "fp32", "tf32" or "bf16". None: by device, fp32 on a CPU, bf16 on a GPU
            that has it (else tf32, else fp32), and fp32 for the solver dopri5. `uns["scldm"]` says which it was.

    Raises:
        CheckpointError: No model is there, or VAE and flow do not belong together.
        ArgumentError: An argument cannot be used, or the device does not have the precision; all are listed.

    >>> model = load(folder)
    >>> model
    scldm.Model: VAE of 6 genes, 3 x 4 latents; flow with labels cell_type (3), donor (2); on cpu
    """
    given = Arguments()
    given.one_of("weights", weights, get_args(Weights))
    given.path("folder", folder)
    if flow is not None:
        given.path("flow", flow)
    device = given.device("device", device)
    if precision is not None:
        given.one_of("precision", precision, PRECISIONS)
    if not given.problems:
        try:
            resolve(precision, device)
        except PrecisionError as error:
            given.problems.append(str(error))
    given.raise_problems()
    found = find_models(folder, weights=weights)
    if flow is not None:
        found = ModelFolders(found.vae, Path(flow).expanduser())
    vae = load_vae(found.vae, device=device)
    pair = None if found.flow is None else load_flow(found.flow, weights=weights, device=device)
    if pair is not None:
        try:
            check_pair(vae, pair)
        except ValueError as error:
            raise CheckpointError(f"{found.vae} and {found.flow}: {error}") from error
    return Model(vae, pair, found, weights, precision)


class Model:
    """A VAE and, optionally, the flow on its latents. Created by `scldm.load`."""

    def __init__(
        self, vae: LoadedVAE, flow: LoadedFlow | None, folders: ModelFolders, weights: Weights = "ema",
        precision: Precision | None = None,
    ):  # fmt: skip
        self.vae, self.flow, self.folders, self.weights = vae, flow, folders, weights
        self.device, self._wanted = next(vae.vae.parameters()).device, precision
        self._numerics()

    @property
    def precision(self) -> Precision:
        """Return the precision of the networks' products; with the solver dopri5 it is fp32 unless it was set.

        >>> model.precision
        'fp32'
        """
        return resolve(self._wanted, self.device)

    def _numerics(self, sampler: SamplerConfig | None = None) -> Numerics:
        """Set the networks to the precision of a call and return it.

        Args:
            sampler: Of the flow, if the call integrates it.
        """
        precision = resolve(self._wanted, self.device, solver=None if sampler is None else sampler.solver)
        for network in (self.vae.vae, *(() if self.flow is None else (self.flow.dit,))):
            set_precision(network, precision)
        return Numerics(precision, self.device.type)

    @property
    def vocabulary(self) -> Vocabulary:
        """Genes and labels of the model."""
        return self.vae.vocabulary

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return the classes of each label.

        >>> model.labels["cell_type"]
        ('T', 'B', 'NK')
        """
        return {x.name: x.classes for x in self.vocabulary.labels}

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Return the shape (m, e) of a cell's latents; obsm["X_scldm"] holds them flattened."""
        return self.vae.vae.config.n_latent_tokens, self.vae.vae.config.latent_width

    def to(self, device: str | torch.device) -> Model:
        """Move the networks to a device and return the model.

        Args:
            device: For example "cuda" or "cpu"; "auto": a GPU if there is one.

        Raises:
            ArgumentError: There is no such device, or it lacks the precision that `load` was given.

        >>> model.to("cpu").device
        device(type='cpu')
        """
        given = Arguments()
        device = given.device("device", device)
        if not given.problems:
            try:
                resolve(self._wanted, device)
            except PrecisionError as error:
                given.problems.append(str(error))
        given.raise_problems()
        for network in (self.vae.vae, *(() if self.flow is None else (self.flow.dit,))):
            network.to(device)
        self.device = next(self.vae.vae.parameters()).device
        self._numerics()
        return self

    def __repr__(self) -> str:
        m, e = self.latent_shape
        labels = ", ".join(f"{k} ({len(v)})" for k, v in self.labels.items()) or "none"
        flow = f"flow with labels {labels}" if self.flow is not None else "no flow"
        where = f"on {self.device}" + ("" if self.precision == "fp32" else f" in {self.precision}")
        return f"scldm.Model: VAE of {self.vocabulary.n_genes:,} genes, {m} x {e} latents; {flow}; {where}"

    # ---- real cells ----------------------------------------------------------------------------------------------
    def encode(
        self, adata: anndata.AnnData | str | Path, *, layer: str | None = None, match: Match = "id",
        genes: str | None = None, max_missing: float = 0.2,
    ) -> anndata.AnnData:  # fmt: skip
        """Encode cells: latents in obsm["X_scldm"], (b, m * e) float32; uns["X_scldm"] says in which precision and on
        which kind of device. Deterministic.

        Args:
            adata: Cells with raw counts, in memory or opened with backed="r"; it is modified and returned. A view is
                copied first. Or the path of an h5ad file, which is read.
            layer: Layer of the counts, "raw" for adata.raw; None: X.
            match: How the model's genes are found in var: by "id", or by "symbol".
            genes: var column of gene ids or symbols; None: the index, or feature_id (feature_name).
            max_missing: Largest fraction of the model's genes that var may lack; they count as zeros.

        Raises:
            CellsError: The model cannot use the cells; the message says why and how to fix it.

        >>> model.encode(adata).obsm["X_scldm"].shape
        (70, 12)
        """
        given = Arguments()
        adata, max_missing = _cells_arguments(given, adata, layer, match, genes, max_missing)
        given.raise_problems()
        cells = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        return self._with_latents(adata, cells)

    def _with_latents(self, adata: anndata.AnnData, cells: AlignedCells) -> anndata.AnnData:
        """Return cells with their latents: themselves, or a copy of a view."""
        out = (adata.to_memory() if adata.isbacked else adata.copy()) if adata.is_view else adata
        numerics = self._numerics()
        out.obsm[LATENTS] = latents_of(self.vae, cells, out)
        out.uns[LATENTS] = {**numerics.as_plain(), **source_of(self.folders)}
        return out

    def reconstruct(
        self, adata: anndata.AnnData | str | Path, *, layer: str | None = None, match: Match = "id",
        genes: str | None = None, max_missing: float = 0.2, mean: bool = False, seed: int = 0,
        decoder_condition: Any = None,
    ) -> anndata.AnnData:  # fmt: skip
        """Encode and decode cells: counts drawn from the decoder's negative binomial in X, CSR int32.

        A Gaussian head draws log1p CP10k values instead, float32, and says so in uns["scldm"]["scale"].

        Args:
            mean: Also store the means in layers["mean"], dense float32: b x g x 4 bytes.
            decoder_condition: Condition vectors of an adaLN decoder, (d,) for all cells or (b, d).
            seed: Seed of the draw. Other arguments as in `encode`.

        >>> model.reconstruct(adata, seed=1).shape
        (70, 6)
        """
        given = Arguments()
        adata, max_missing = _cells_arguments(given, adata, layer, match, genes, max_missing)
        mean, seed = given.flag("mean", mean), given.seed(seed)
        given.raise_problems()
        cells = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        vectors = decoder_vectors(self.vae.vae.config, decoder_condition, adata.n_obs, per="each cell")
        numerics = self._numerics()

        @torch.inference_mode()
        def decoded(batch: CellBatch) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray | None]:
            condition = None if vectors is None else torch.from_numpy(vectors[batch.joinids.cpu().numpy()])
            z = self.vae.vae.encode(batch)
            out = self.vae.vae.decode(
                z, batch.library_size, condition=None if condition is None else condition.to(self.device)
            )
            drawn = draw_sparse(out, batch.joinids.tolist(), seed=seed)
            return drawn, flat(z), out.mu.float().cpu().numpy() if mean else None

        parts = list(each_batch(decoded, self.vae, None, cells, adata))
        obs = adata.obs.copy()
        obs["is_synthetic"] = True
        obs["library_size"] = np.asarray(cells.counts.sum(1)).ravel().astype(np.float32)
        about = {"kind": "reconstruct", "seed": seed, **digests(self.folders), **numerics.as_plain()}
        about |= source_of(self.folders)
        made = made_cells(self.vae, [p[0] for p in parts], [p[1] for p in parts], obs, about)
        if mean:
            made.layers["mean"] = np.concatenate([p[2] for p in parts])
        return made

    def log_likelihood(
        self, adata: anndata.AnnData | str | Path, *, layer: str | None = None, match: Match = "id",
        genes: str | None = None, max_missing: float = 0.2, flow: bool = False, probes: int = 1, seed: int = 0,
    ) -> pd.DataFrame:  # fmt: skip
        """Return likelihoods of cells, one row each: `nll` and `nll_per_gene` in nats; with `flow`, also
        `flow_log_prob`.

        nll = -sum over genes of log NB(count; mu(z), theta) at the cell's own latents z: how well the model describes
        the cell, not a marginal likelihood. flow_log_prob is the log-likelihood of z under the flow and the labels in
        obs. The table's attrs say in which precision and on which kind of device.

        Args:
            probes: Random probes of the divergence that are averaged; the error falls with their square root.
            seed: Seed of the probes. Other arguments as in `encode`.

        >>> model.log_likelihood(adata).columns.tolist()
        ['nll', 'nll_per_gene']
        """
        require_counts_head(self.vae, self.folders)
        refuse_adaln(self.vae.vae.config, "log_likelihood")
        given = Arguments()
        adata, max_missing = _cells_arguments(given, adata, layer, match, genes, max_missing)
        flow, seed = given.flag("flow", flow), given.seed(seed)
        probes = given.whole("probes", probes, least=1)
        given.raise_problems()
        if flow and self.flow is None:
            raise CheckpointError(f"{self.folders.vae} has no flow next to it; use scldm.load(vae, flow=folder)")
        if flow and self.flow is not None:
            require_whole_flow(self.flow, "a likelihood of latents (flow=True)")
        cells = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        conditions = class_ids(adata, self.vocabulary) if flow else {}
        sampler = SamplerConfig(solver="midpoint", steps=20)  # as a log_likelihood job
        numerics = self._numerics(sampler)

        def likelihoods(batch: CellBatch) -> pd.DataFrame:
            with torch.no_grad():
                z = self.vae.vae.encode(batch)
                nll = self.vae.vae.nll(batch, z)
            found = {"nll": nll.float(), "nll_per_gene": (nll / self.vocabulary.n_genes).float()}
            if flow and self.flow is not None:
                ids = batch.joinids.tolist()
                found["flow_log_prob"] = latent_log_prob(
                    self.flow, z, batch.conditions, ids, sampler=sampler, n_probes=probes, seed=seed
                ).float()
            return pd.DataFrame({k: v.cpu().numpy() for k, v in found.items()})

        rows = each_batch(likelihoods, self.vae, self.flow if flow else None, cells, adata, conditions)
        table = pd.concat(list(rows)).set_axis(adata.obs_names)
        table.attrs["scldm"] = numerics.as_plain()
        return table

    def perturb(
        self, adata: anndata.AnnData | str | Path, to: Mapping[str, str | None], *, start: str = "latents",
        counts: str = "drawn", guidance: Mapping[str, float] | float | None = None, seed: int = 0,
        sampler: SamplerConfig | Mapping[str, Any] | None = None, unknown_labels: str = "error",
        layer: str | None = None, match: Match = "id", genes: str | None = None, max_missing: float = 0.2,
    ) -> anndata.AnnData:  # fmt: skip
        """Predict cells under another condition, as a perturb job: bit for bit for the cells of one `.h5ad`.

        Args:
            to: Labels that change and their new classes; None: without the label.
            start: "latents": by way of the noise that the cell's latents come from. "control": straight from the
                latents of control cells, by a flow that was trained so. "noise": from new noise.
            counts: "drawn": from the decoder's distribution. "changed": the cell's own counts, changed as the means.
            guidance: Of the integration under the new labels; None: the sampler's.
            sampler: Settings; None: {"solver": "midpoint", "steps": 20}.
            unknown_labels: "error", or "none": use cells that lack a label without it.
            seed: Seed of noise and counts. Other arguments as in `encode`.

        Returns:
            AnnData as a perturb job writes it: X CSR int32 counts, obsm["X_scldm"], and `to_<label>` in obs.

        Raises:
            RequestError: Arguments cannot be used; all are listed.
            CellsError: The model cannot use the cells, or they are not the control cells that `start` needs.

        >>> model.perturb(adata, {"cell_type": "NK"}, seed=1).obs["to_cell_type"].unique().tolist()
        ['NK']
        """
        from scldm.api.perturb import UNKNOWN, own_classes, perturbed, read_perturbation

        flow, given = self._require_flow("cells are moved by one"), Arguments()
        adata, max_missing = _cells_arguments(given, adata, layer, match, genes, max_missing)
        given.one_of("unknown_labels", unknown_labels, UNKNOWN)
        how = read_perturbation(
            given, to, start, counts, guidance, sampler, seed, vae=self.vae, flow=flow, weights=self.weights
        )
        cells = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        ids = own_classes(adata, self.vocabulary, how, flow, unknown_labels)
        numerics = self._numerics(how.sampler)
        return perturbed(adata, cells, ids, how, vae=self.vae, flow=flow, folders=self.folders, numerics=numerics)

    def transform(
        self, adata: anndata.AnnData | str | Path, to: Mapping[str, str], *,
        guidance: Mapping[str, float] | float | None = None, seed: int = 0,
        sampler: SamplerConfig | Mapping[str, Any] | None = None, unknown_labels: str = "error",
        layer: str | None = None, match: Match = "id", genes: str | None = None, max_missing: float = 0.2,
    ) -> anndata.AnnData:  # fmt: skip
        """Predict the counts that cells would have in another donor or batch: counts corrected to one reference.

        Computed as `perturb(adata, to, start="latents", counts="changed")`: a cell's own counts change by the factor by
        which the decoder's means change. Cells that are of the reference already keep their counts and latents, bit for
        bit. Labels that `to` does not name stay. What differs between batches and between cells of other labels, at
        the same time, cannot be told apart: give every label that should survive to the model in training.

        Args:
            to: Labels and the class that all cells are corrected to: {"donor": "d2"}.
            guidance: Of the integration under the new labels; None: the sampler's.
            sampler: Settings; None: {"solver": "midpoint", "steps": 20}.
            unknown_labels: "error", or "none": use cells that lack a label without it.
            seed: Seed of the molecules that are added and left out. Other arguments as in `encode`.

        Returns:
            AnnData with the cells' names and obs: X CSR int32 counts over the model's genes, obsm["X_scldm"], in obs
            `to_<label>`, and `is_synthetic`, which is False for cells that were not changed.

        Raises:
            RequestError: Arguments cannot be used; all are listed.
            CellsError: The model cannot use the cells.

        >>> corrected = model.transform(adata, {"donor": "d1"})
        >>> (corrected.obs["is_synthetic"] == (adata.obs["donor"] != "d1")).all()
        True
        """
        from scldm.api.analysis.corrected import already, read_transform
        from scldm.api.perturb import UNKNOWN, own_classes, perturbed

        flow, given = self._require_flow("cells are moved by one"), Arguments()
        adata, max_missing = _cells_arguments(given, adata, layer, match, genes, max_missing)
        given.one_of("unknown_labels", unknown_labels, UNKNOWN)
        how = read_transform(given, to, guidance, sampler, seed, vae=self.vae, flow=flow, weights=self.weights)
        cells = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        ids = own_classes(adata, self.vocabulary, how, flow, unknown_labels)
        return perturbed(
            adata, cells, ids, how, vae=self.vae, flow=flow, folders=self.folders,
            numerics=self._numerics(how.sampler), kind="transform",
            as_measured=already(ids, how.to, self.vocabulary),
        )  # fmt: skip

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
        adata, max_missing = _cells_arguments(given, adata, layer, match, genes, max_missing)
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
        adata, max_missing = _cells_arguments(given, adata, layer, match, genes, max_missing)
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
            adata, max_missing = _cells_arguments(given, end, layer, match, genes, max_missing, name=name)
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
        query, max_missing = _cells_arguments(given, query, layer, match, genes, max_missing, name="query")
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

    def _require_flow(self, why: str) -> LoadedFlow:
        if self.flow is None:
            raise CheckpointError(f"{self.folders.vae} has no flow, and {why}; scldm.load(vae, flow=folder)")
        return self.flow

    # ---- generated cells -----------------------------------------------------------------------------------------
    def generate(
        self, conditions: Conditions = None, *, n: int | None = None, seed: int = 0,
        guidance: Mapping[str, float] | float | None = None, library_size: float | str = "statistics",
        genes: Sequence[str] | None = None, sampler: SamplerConfig | Mapping[str, Any] | None = None,
        decoder_condition: Any = None, start: Literal["noise", "control"] = "noise",
    ) -> anndata.AnnData:  # fmt: skip
        """Generate cells under conditions.

        Args:
            conditions: {label: class} for one condition, {label: [class, …]} for several; or a table (DataFrame, list
                of dictionaries) with label columns, `n_cells` and, optionally, `guidance`, `guidance.<label>`,
                `guidance.*` (of joint labels together, beside single ones), `library_size`. A label that is absent or
                None is left open. A label of values takes others than the data's, with a warning of how far they are.
                None: unconditional cells. A DataFrame with all labels and without `n_cells`, such as the obs of real
                cells: one cell of each row.
            n: Cells of each row, if the table has no `n_cells`.
            seed: A cell is a function of (models, sampler, seed, request, its position in the request).
            guidance: Scale w in v = v_null + w (v_cond - v_null); None: the sampler's.
            library_size: "statistics": drawn from the training cells' statistics of the condition; or one number.
            genes: Ids or names of the genes to keep; the softmax runs over all genes either way.
            sampler: Settings, for example {"solver": "rk4", "steps": 20}. A distilled flow makes its own jumps.
            decoder_condition: Vectors of an adaLN decoder, (d,) for all cells or (r, d) for rows; others take none.
            start: "noise", or "control": control cells are made from noise and carried to the condition, by a flow that
                was trained from control cells too.

        Returns:
            AnnData as a generate job writes it: X CSR int32, obs with the training categories, obsm["X_scldm"]. X of a
            model with a Gaussian head holds log1p CP10k values, float32, and uns["scldm"]["scale"] says so: their mean,
            or with sampler={"expression": "draw"} Normal(mean, 1).

        Raises:
            RequestError: Arguments cannot be used, or labels, classes or genes are unknown; all are listed.

        >>> cells = model.generate({"cell_type": "B"}, n=4, seed=1)
        >>> cells.obs["cell_type"].tolist(), cells.shape
        (['B', 'B', 'B', 'B'], (4, 6))
        """
        flow, given = self._require_flow("cells come from one"), Arguments()
        seed = given.seed(seed)
        given.one_of("start", start, ("noise", "control"))
        if start in ("noise", "control") and (problem := generation_start_problem(flow.start, start)):
            given.problems.append(problem)
        library_size = library_size_argument(given, library_size)
        settings = sampler_settings(given, sampler, guidance, loaded=self.weights)
        given.problems += distilled_problems(flow, settings, start)
        request, kept = read_conditions(given, conditions, n, settings, genes, self.vocabulary)
        check_fits(request.n_cells, n_latent_numbers=flow.n_latent_tokens * flow.latent_width)
        numerics = self._numerics(settings)
        flow = with_values(flow, (row.condition for row in request.rows))
        rules = Settings(settings.guidance, library_size)
        gaussian = self.vae.vae.config.head == "gaussian"
        _require_settings_of_head(request, rules, settings, gaussian=gaussian)
        recipe = recipe_of(
            request, rules, flow.vocabulary, flow.library_sizes, flow.dit.strategy, counts=not gaussian,
            distilled=flow.distilled,
        )  # fmt: skip
        vectors = decoder_vectors(
            self.vae.vae.config, decoder_condition, len(request.rows), per="each row of the conditions"
        )
        recipe = replace(recipe, decoder_condition=vectors)
        maker = CellMaker(self.vae, flow, recipe, sampler=settings, seed=seed, genes=kept, start=start)
        made = list(each_tile(maker.tile_of, range(0, request.n_cells, maker.tile), (self.vae.vae, flow.dit)))
        about = {"kind": "generate", "seed": seed, "sampler": settings.model_dump_json(), "request": request.digest,
                 "library_size": str(library_size), **digests(self.folders), **vectors_digest(vectors),
                 **({} if start == "noise" else {"start": start})}  # fmt: skip
        prefix = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        prefix = named_after(prefix, numerics.precision)
        about |= numerics.as_plain() | source_of(self.folders)
        about |= told(value_notes(flow.vocabulary, (row.condition for row in request.rows)))
        digits = len(str(max(1, request.n_cells - 1)))
        ids = np.arange(request.n_cells, dtype=np.int64)
        names = [f"{prefix}-{i:0{digits}d}" for i in ids.tolist()]
        obs = generated_obs(ids, names, recipe, request, rules, flow.vocabulary)
        if not gaussian:
            obs["library_size"] = np.concatenate([np.zeros(0, np.float32), *(t.library_size for t in made)])
        return made_cells(
            self.vae, [t.values for t in made], [t.latents for t in made], obs, about, kept,
            expression=settings.expression,
        )  # fmt: skip

    def plot_umap(
        self, real: anndata.AnnData | str | Path, generated: anndata.AnnData | None = None, *, color: str | None = None,
        layer: str | None = None, fit: Literal["real", "both"] = "real", max_cells: int = 2000, seed: int = 0,
    ) -> Figure:  # fmt: skip
        """Draw real and generated cells in one UMAP, in 30 principal components of the real ones (log1p CP10k).

        Args:
            real: Cells with counts and the model's genes, by var_names or `feature_id`; more than max_cells are drawn
                from by seed.
            generated: Cells of `generate`. None: as many are generated, with the labels of the real ones if these have
                all labels of the model.
            color: obs column of both; adds a panel for each, by its classes.
            layer: Layer of the real counts; None: X.
            fit: What UMAP is fitted to: "real" cells, which generated ones are then placed among; or "both", which
                shows generated cells that no real ones are like as islands.
            max_cells: Cells of a side.
            seed: Of the choice of cells, of generation and of UMAP.

        Returns:
            A figure of matplotlib: real and generated cells over each other and, with color, a panel for each.

        Raises:
            ArgumentError: Arguments cannot be used; all are listed.
            CellsError: Real and generated cells cannot be compared.
            ModuleNotFoundError: The extra `plot` is not installed.

        >>> len(model.plot_umap(adata, color="cell_type").axes)
        3
        """
        given = Arguments()
        real = given.anndata("real", real)
        if generated is not None:
            given.anndata("generated", generated)
        given.text("color", color)
        given.text("layer", layer)
        given.one_of("fit", fit, ("real", "both"))
        max_cells, seed = given.whole("max_cells", max_cells, least=10), given.seed(seed)
        given.raise_problems()
        from scldm.api.analysis.umap_plot import plot

        chosen = np.sort(np.random.default_rng(seed).permutation(real.n_obs)[:max_cells])
        real = real[chosen].to_memory() if real.isbacked else real[chosen].copy()
        if generated is None:
            labelled = bool(self.labels) and all(x in real.obs and real.obs[x].notna().all() for x in self.labels)
            asked = real.obs[list(self.labels)] if labelled else None
            generated = self.generate(asked, n=None if labelled else real.n_obs, seed=seed)
        elif generated.n_obs > max_cells:
            rows = np.random.default_rng(seed).permutation(generated.n_obs)[:max_cells]
            generated = generated[np.sort(rows)].copy()
        return plot(generated, real, color=color, layer=layer, fit=fit, seed=seed)

    # ---- training ------------------------------------------------------------------------------------------------
    def finetune(
        self, adata: anndata.AnnData | str | Path, labels: Sequence[str] | str | None = None, *,
        name: str | None = None, output: str | Path = "runs", keep_vae: bool = False, lora: int | None = None,
        freeze: Sequence[str] = (), settings: Mapping[str, Any] | Sequence[str] | None = None, **options: Any,
    ) -> Model:  # fmt: skip
        """Train on from this model on other cells, over its genes; return the new model. This one stays as it is.

        It is `scldm.train(adata, labels, start_from=…)`: the job that is written as output/name/job.yaml has
        `train_vae.start_from`, `train_flow.start_from` and `ingest.genes.vocabulary`, and `scldm run` does the same.
        Classes are matched by name; a new one starts at the null class.

        Args:
            adata: Cells with raw counts, or their path, as `scldm.train` takes them.
            labels: obs columns; None: those of this model that the cells have (of a path: all of them).
            name: Of the new pipeline; None: that of this model, and -tuned.
            keep_vae: Use the VAE as it is, and train the flow alone.
            lora: Rank of adapters that are trained in place of all weights.
            freeze: Beginnings of names of the VAE's parameters that stay as they are, for example ["encoder"].
            settings: What is changed of the job. Other options (seed, gpus, layer, …) as in `scldm.train`.

        Raises:
            ArgumentError: Arguments cannot be used.
            AttributeError: The pipeline, which trains, is not installed.
        """
        import scldm
        from scldm.api.training_run import name_to_tune, start_of

        start = start_of(self.folders, self.weights, {"keep_vae": keep_vae, "lora": lora, "freeze": freeze})
        own = list(self.labels) if self.flow is not None else []
        if labels is None:
            labels = [x for x in own if not isinstance(adata, anndata.AnnData) or x in adata.obs] or None
        name = name_to_tune(self.folders) if name is None else name
        tuned: Model = scldm.train(
            adata, labels, name=name, output=output, settings=settings, start_from=start, **options
        )
        return tuned

    @property
    def history(self) -> pd.DataFrame:
        """Metrics of the trainings of its VAE and flow, indexed by stage and step.

        Raises:
            CheckpointError: The model is not in the folder of the pipeline that trained it.
        """
        from scldm.api.training_run import history

        return history(self.folders)

    def report(self) -> Report:
        """Return the newest report of its cells, which a notebook shows.

        Raises:
            CheckpointError: Its cells were not evaluated.
        """
        from scldm.api.training_run import newest_report

        return newest_report(self.folders)

    # ---- folders -------------------------------------------------------------------------------------------------
    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write a folder in Hugging Face's layout: README.md (the model card), vae/ and, if there is one, flow/.

        Args:
            force: Replace a folder that this method wrote before. Other folders are never replaced.

        >>> again = Model.from_pretrained(model.save_pretrained(tmp / "mine"))
        >>> again.labels == model.labels
        True
        """
        from scldm.api.hub.pretrained import write_pretrained

        return write_pretrained(self, Path(folder).expanduser(), force=force, in_python=True)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu",
        precision: Precision | None = None, token: str | bool | None = None,
    ) -> Model:  # fmt: skip
        """Load a model of the Hugging Face hub, or of a local folder that `save_pretrained` or `scldm convert` wrote.

        The hub is asked if a revision is given, if the name begins with hf:// or has the form org/name@revision, or if
        it has the form org/name and there is no folder of that name. Everything else is a folder.

        Args:
            name: "org/name", or a folder.
            revision: Branch, tag or commit of the hub; None: its main branch. `uns["scldm"]["source"]` of cells names
                the commit.
            token: Of an account that may read the repository; None: the one that `hf auth login` stored.
            device: As in `scldm.load`, and so is precision.

        Raises:
            CheckpointError: There is no such model, a file is damaged, or a folder of that name holds no model.
        """
        return load(pretrained_folder(name, revision, token), device=device, precision=precision)

    def push_to_hub(
        self, repository: str, *, revision: str | None = None, private: bool | None = None,
        token: str | bool | None = None, commit_message: str | None = None,
    ) -> str:  # fmt: skip
        """Upload the folder of `save_pretrained` to the Hugging Face hub, as one commit.

        The card of an earlier upload is replaced, but for the licence in its head. Parts that this model does not have
        are removed; a repository that holds something else is refused.

        Args:
            repository: "org/name", or "user/name"; made if it is not there.
            revision: Branch to write to, made if it is not there; None: the main branch.
            private: Whether a new repository is private; None: as the organisation does it.
            token: Of an account that may write there; None: the one that `hf auth login` stored, or HF_TOKEN.
            commit_message: None: "Upload a model of scldm".

        Returns:
            The name with the commit, hf://org/name@<commit>, which `scldm.load` and jobs take.

        Raises:
            ArgumentError: Arguments cannot be used; all are listed.
            CheckpointError: The repository holds something else, or the hub refuses; nothing was committed.
            ModuleNotFoundError: `huggingface_hub` is not installed.
        """
        from scldm.api.hub.push import push

        return push(self, repository, revision=revision, private=private, token=token, commit_message=commit_message)


def _require_settings_of_head(request: Request, rules: Settings, settings: SamplerConfig, *, gaussian: bool) -> None:
    """Raise RequestError for settings that the VAE's head would ignore."""
    problems = expression_problems(request, rules, temperature=settings.temperature) if gaussian else []
    if not gaussian and (problem := expression_setting_problem(settings.expression)):
        problems.append(problem)
    if problems:
        raise RequestError("\n".join(problems))


def _cells_arguments(
    given: Arguments, adata: Any, layer: Any, match: Any, genes: Any, max_missing: Any, *, name: str = "adata"
) -> tuple[anndata.AnnData, float]:
    """Check the arguments that say which cells, counts and genes are meant; returns the cells and max_missing."""
    cells = given.anndata(name, adata)
    given.text("layer", layer)
    given.one_of("match", match, get_args(Match))
    given.text("genes", genes)
    return cells, given.number("max_missing", max_missing, within=(0.0, 1.0))
