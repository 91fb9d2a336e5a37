"""Fit the inverse dispersion theta of genes: its most probable value, given the means that a trained model decodes.

Adam moves log theta by at most a learning rate a step, in a direction that is noise for most genes, so after a short
training theta is still near where it began. Too small a theta gives cells too noisy to recognise their type, and
costs more likelihood than the latents gain. Given the means, theta of a gene is one number with a concave likelihood
nearby: a few Newton steps find it.

Shape letters: n cells, g genes, k non-zero entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.nn.likelihood import nb_nll
from scldm.nn.vae import VAE

LOWEST, HIGHEST = math.log(1e-2), math.log(1e3)  # bounds of log theta; at 1e3 a mean of 100 has 10 % more variance
PRIOR_SD = 1.5  # of log theta about that of all genes, to which genes of few counts shrink
NEWTON_STEPS, TOLERANCE = 30, 1e-9  # at most; change of log theta that ends the iteration
CHUNK = 1024  # genes: bounds the temporaries to n CHUNK numbers


@dataclass(frozen=True)
class ThetaFit:
    """Negative log-likelihood of the fitted cells before and after, in nats summed over genes."""

    n_cells: int
    nll_before: float
    nll_after: float


@dataclass(frozen=True)
class GeneEntries:
    """Non-zero counts, ordered by gene."""

    gene: Tensor  # (k,)
    cell: Tensor  # (k,)
    count: Tensor  # (k,) float64

    def genes(self, start: int, stop: int) -> GeneEntries:
        """Return the entries of genes start .. stop - 1, numbered from 0."""
        low, high = torch.searchsorted(self.gene, torch.tensor([start, stop], device=self.gene.device)).tolist()
        return GeneEntries(self.gene[low:high] - start, self.cell[low:high], self.count[low:high])


@torch.no_grad()
def fit_theta(vae: VAE, batches: Iterable[CellBatch]) -> ThetaFit:
    """Set the theta of a model with one theta per gene to its most probable value, given the means that it decodes.

    The prior of log theta is a normal about the single value that fits all genes best; a gene that no cell expresses is
    left unchanged. Reads the cells once and holds their means, n g numbers.

    Args:
        vae: Model with the head `nb_shared`.
        batches: Training cells; genes that are not `measured` are left out.

    Raises:
        ValueError: The model does not have one theta per gene, or there are no cells.
    """
    if vae.log_theta is None:
        raise ValueError(f"theta is fitted for the head nb_shared; this model has {vae.config.head}")
    means, cells = [], list(batches)
    if not cells:
        raise ValueError("theta cannot be fitted on no cells")
    for batch in cells:
        means.append(vae.decode_mu(vae.encode(batch), batch.library_size, measured=batch.measured).float())
    known = [batch.measured for batch in cells if batch.measured is not None]
    mu, measured = torch.cat(means), torch.cat(known) if known else None
    before = sum(_nll(vae, batch, m) for batch, m in zip(cells, means, strict=True))
    vae.log_theta.copy_(fit_log_theta(vae.log_theta, mu, collect_entries(cells), measured=measured))
    after = sum(_nll(vae, batch, m) for batch, m in zip(cells, means, strict=True))
    return ThetaFit(len(mu), before / len(mu), after / len(mu))


def _nll(vae: VAE, batch: CellBatch, mu: Tensor) -> float:
    assert vae.log_theta is not None
    log_proportion = (mu / batch.library_size[:, None]).log()  # minus infinity where a gene was not measured
    return float(nb_nll(batch, log_proportion, vae.log_theta.exp()).double().sum())


def collect_entries(cells: Iterable[CellBatch]) -> GeneEntries:
    """Return the non-zero counts of measured genes of all cells."""
    genes, rows, counts, n = [], [], [], 0
    for batch in cells:
        cell, gene = batch.cell_index, batch.gene_ids
        kept = torch.ones_like(gene, dtype=torch.bool) if batch.measured is None else batch.measured[cell, gene]
        genes.append(gene[kept])
        rows.append(cell[kept] + n)
        counts.append(batch.counts[kept].double())
        n += batch.n_cells
    gene = torch.cat(genes)
    order = gene.argsort(stable=True)
    return GeneEntries(gene[order], torch.cat(rows)[order], torch.cat(counts)[order])


def fit_log_theta(log_theta: Tensor, mu: Tensor, entries: GeneEntries, *, measured: Tensor | None = None) -> Tensor:
    """Return the most probable log theta of every gene, (g,).

    Args:
        log_theta: Starting point, (g,).
        mu: Means, (n, g).
        entries: Non-zero counts.
        measured: Genes that were measured in each cell, (n, g) bool; all if None.
    """
    n_genes = len(log_theta)
    seen = torch.bincount(entries.gene, minlength=n_genes) > 0
    centre = _centre(mu, entries, seen, measured)
    out = log_theta.double().clone()
    for start in range(0, n_genes, CHUNK):
        stop = min(start + CHUNK, n_genes)
        part, here = mu[:, start:stop].double(), entries.genes(start, stop)
        mask = None if measured is None else measured[:, start:stop]
        derivatives = lambda eta, x=part, k=here, m=mask: _with_prior(eta, centre, slopes(eta, x, k, m))  # noqa: E731
        eta = _newton_ascent(derivatives, out[start:stop].clamp(LOWEST, HIGHEST))
        out[start:stop] = torch.where(seen[start:stop], eta, out[start:stop])
    return out.to(log_theta.dtype)


def _centre(mu: Tensor, entries: GeneEntries, seen: Tensor, measured: Tensor | None) -> float:
    """Return the log theta that fits all genes best, by the genes of most counts (the others tell little)."""
    total = torch.zeros(len(seen), dtype=torch.float64, device=mu.device).index_add(0, entries.gene, entries.count)
    genes = total.argsort(descending=True)[: min(CHUNK, int(seen.sum()))].sort().values
    place = torch.full((len(seen),), -1, device=mu.device, dtype=torch.int64)
    place[genes] = torch.arange(len(genes), device=mu.device)
    kept = place[entries.gene] >= 0
    few = GeneEntries(place[entries.gene[kept]], entries.cell[kept], entries.count[kept])
    part, mask = mu[:, genes].double(), None if measured is None else measured[:, genes]

    def derivatives(eta: Tensor) -> tuple[Tensor, Tensor]:
        slope, bend = slopes(eta.expand(len(genes)), part, few, mask)
        return slope.sum()[None], bend.sum()[None]

    return _newton_ascent(derivatives, torch.zeros(1, dtype=torch.float64, device=mu.device)).item()


def _with_prior(eta: Tensor, centre: float, likelihood: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return likelihood[0] - (eta - centre) / PRIOR_SD**2, likelihood[1] - 1 / PRIOR_SD**2


def _newton_ascent(derivatives: Callable[[Tensor], tuple[Tensor, Tensor]], eta: Tensor) -> Tensor:
    """Maximise by Newton steps of at most 1; where the function is not concave, by a step of 1 along its slope."""
    for _ in range(NEWTON_STEPS):
        slope, bend = derivatives(eta)
        step = torch.where(bend < 0, -slope / bend, slope.sign()).clamp(-1, 1)
        new = (eta + step).clamp(LOWEST, HIGHEST)
        moved, eta = float((new - eta).abs().max()), new
        if moved < TOLERANCE:
            break
    return eta


def slopes(eta: Tensor, mu: Tensor, entries: GeneEntries, measured: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first and second derivative of the log-likelihood by eta = log theta, (g,) each, summed over cells."""
    theta, both = eta.exp(), eta.exp() + mu  # (g,), (n, g)
    zero_1 = eta + 1 - both.log() - theta / both
    zero_2 = 1 / theta - 1 / both - mu / both.square()
    if measured is not None:
        zero_1, zero_2 = zero_1 * measured, zero_2 * measured
    x, t, b = entries.count, theta[entries.gene], both[entries.cell, entries.gene]
    one = -x / b + torch.digamma(x + t) - torch.digamma(t)
    two = x / b.square() + torch.polygamma(1, x + t) - torch.polygamma(1, t)
    by_theta = zero_1.sum(0).index_add(0, entries.gene, one)
    by_theta_2 = zero_2.sum(0).index_add(0, entries.gene, two)
    slope = theta * by_theta
    return slope, slope + theta.square() * by_theta_2
