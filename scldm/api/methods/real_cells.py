"""Methods of `scldm.Model` that take real cells: encoding, decoding, likelihoods, other conditions.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scldm.api.arguments import Arguments
from scldm.api.methods.core import ModelCore, cells_arguments
from scldm.api.parts import (
    LATENTS,
    digests,
    each_batch,
    flat,
    latents_of,
    made_cells,
    require_counts_head,
    source_of,
)
from scldm.data.align import AlignedCells, Match, align, class_ids
from scldm.data.batch import CellBatch
from scldm.errors import CheckpointError
from scldm.flow.config import SamplerConfig
from scldm.generation.decoder_condition import decoder_vectors, refuse_adaln
from scldm.generation.real_cells import draw_sparse, latent_log_prob, require_whole_flow
from scldm.generation.recipe import genes_table


class RealCells(ModelCore):
    """Real cells in, and what the model makes of them out."""

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
            genes: var column of gene ids or symbols; None: feature_id (feature_name) or the index, or if none of the
                model's genes is there the column of var that holds them.
            max_missing: Largest fraction of the model's genes that var may lack; they count as zeros.

        Raises:
            CellsError: The model cannot use the cells; the message says why and how to fix it.

        >>> model.encode(adata).obsm["X_scldm"].shape
        (70, 12)
        """
        given = Arguments()
        adata, max_missing = cells_arguments(given, adata, layer, match, genes, max_missing)
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

    def align(
        self, adata: anndata.AnnData | str | Path, *, layer: str | None = None, match: Match = "id",
        genes: str | None = None, max_missing: float = 0.2,
    ) -> anndata.AnnData:  # fmt: skip
        """Return cells with their counts over the model's genes, in its order and with its names in var.

        Generated cells have these genes, so that both can be concatenated: anndata.concat([model.align(adata), cells]).

        Args:
            adata: As in `encode`, with the other arguments; it is not modified. Genes that it lacks are zeros.

        Raises:
            CellsError: The model cannot use the cells.

        >>> model.align(adata).var_names.equals(model.generate(n=1).var_names)
        True
        """
        given = Arguments()
        adata, max_missing = cells_arguments(given, adata, layer, match, genes, max_missing)
        given.raise_problems()
        cells = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        return anndata.AnnData(cells.counts.copy(), obs=adata.obs.copy(), var=genes_table(self.vocabulary, None))

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
        adata, max_missing = cells_arguments(given, adata, layer, match, genes, max_missing)
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
        adata, max_missing = cells_arguments(given, adata, layer, match, genes, max_missing)
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
        adata, max_missing = cells_arguments(given, adata, layer, match, genes, max_missing)
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
        adata, max_missing = cells_arguments(given, adata, layer, match, genes, max_missing)
        given.one_of("unknown_labels", unknown_labels, UNKNOWN)
        how = read_transform(given, to, guidance, sampler, seed, vae=self.vae, flow=flow, weights=self.weights)
        cells = align(adata, self.vocabulary, layer=layer, match=match, genes=genes, max_missing=max_missing)
        ids = own_classes(adata, self.vocabulary, how, flow, unknown_labels)
        return perturbed(
            adata, cells, ids, how, vae=self.vae, flow=flow, folders=self.folders,
            numerics=self._numerics(how.sampler), kind="transform",
            as_measured=already(ids, how.to, self.vocabulary),
        )  # fmt: skip
