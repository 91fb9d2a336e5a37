"""Methods of `scldm.Model` that generate cells and show them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anndata
import numpy as np

from scldm.api.arguments import Arguments
from scldm.api.conditions import Conditions, library_size_argument, read_conditions, sampler_settings
from scldm.api.methods.core import ModelCore
from scldm.api.parts import (
    check_fits,
    digests,
    made_cells,
    source_of,
    told,
)
from scldm.checkpoints.asked_values import value_notes, with_values
from scldm.flow.config import SamplerConfig
from scldm.flow.transport import generation_start_problem
from scldm.generation.cell_maker import CellMaker, distilled_problems
from scldm.generation.decoder_condition import decoder_vectors, vectors_digest
from scldm.generation.expression_draw import expression_problems, expression_setting_problem
from scldm.generation.recipe import generated_obs, named_after, recipe_of
from scldm.generation.request import Request, Settings
from scldm.generation.request_table import RequestError
from scldm.generation.tile_threads import each_tile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Generated(ModelCore):
    """Cells that did not exist before."""

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


def _require_settings_of_head(request: Request, rules: Settings, settings: SamplerConfig, *, gaussian: bool) -> None:
    """Raise RequestError for settings that the VAE's head would ignore."""
    problems = expression_problems(request, rules, temperature=settings.temperature) if gaussian else []
    if not gaussian and (problem := expression_setting_problem(settings.expression)):
        problems.append(problem)
    if problems:
        raise RequestError("\n".join(problems))
