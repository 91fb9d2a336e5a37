"""What a loaded model is: its networks, labels, device and precision; and the check of arguments that name cells."""

from __future__ import annotations

from typing import Any, Self, get_args

import anndata
import torch

from scldm.api.arguments import Arguments
from scldm.api.folders import ModelFolders, Weights
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.align import Match
from scldm.data.vocabulary import Vocabulary
from scldm.errors import CheckpointError
from scldm.flow.config import SamplerConfig
from scldm.nn.kernels.precision import Numerics, Precision, PrecisionError, resolve, set_precision


class ModelCore:
    """A VAE and, optionally, the flow on its latents."""

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

    def to(self, device: str | torch.device) -> Self:
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

    def _numerics(self, sampler: SamplerConfig | None = None) -> Numerics:
        """Set the networks to the precision of a call and return it.

        Args:
            sampler: Of the flow, if the call integrates it.
        """
        precision = resolve(self._wanted, self.device, solver=None if sampler is None else sampler.solver)
        for network in (self.vae.vae, *(() if self.flow is None else (self.flow.dit,))):
            set_precision(network, precision)
        return Numerics(precision, self.device.type)

    def _require_flow(self, why: str) -> LoadedFlow:
        if self.flow is None:
            raise CheckpointError(f"{self.folders.vae} has no flow, and {why}; scldm.load(vae, flow=folder)")
        return self.flow


def cells_arguments(
    given: Arguments, adata: Any, layer: Any, match: Any, genes: Any, max_missing: Any, *, name: str = "adata"
) -> tuple[anndata.AnnData, float]:
    """Check the arguments that say which cells, counts and genes are meant; returns the cells and max_missing."""
    cells = given.anndata(name, adata)
    given.text("layer", layer)
    given.one_of("match", match, get_args(Match))
    given.text("genes", genes)
    return cells, given.number("max_missing", max_missing, within=(0.0, 1.0))
