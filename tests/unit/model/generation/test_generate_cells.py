"""A generated cell is a function of (models, sampler, seed, request, id), to the last bit, in any batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, vocabulary, write_flow, write_vae

from scldm.checkpoints.native import LoadedFlow, LoadedVAE, load_flow, load_vae
from scldm.data.library_size import LibrarySizes, LogNormal
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.guidance import JOINT, guided_prediction, per_cell_prediction
from scldm.generation.cell_maker import CellMaker, GeneratedCells, Recipe
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE


def joined(parts: list[GeneratedCells]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, dense counts, latents."""
    return tuple(
        np.concatenate(x)
        for x in ([p.cell_ids for p in parts], [p.values.toarray() for p in parts], [p.latents for p in parts])
    )


def by_ids(maker: CellMaker, cuts: list[int]) -> tuple[np.ndarray, ...]:
    return joined([c for a, b in pairwise(cuts) for c in maker.cells(a, b)])


@pytest.fixture(scope="module")
def realistic() -> CellMaker:
    """Upstream's widths, fewer layers; 17,002 genes; two labels, of which a cell has none, one or both."""
    torch.manual_seed(0)
    n_genes, labels = 17_002, (LabelVocabulary("a", ("x", "y", "z")), LabelVocabulary("b", ("u", "v")))
    names = tuple(f"g{i}" for i in range(n_genes))
    vocabulary = Vocabulary(names, names, labels)
    config = VAEConfig(
        d_model=32, n_layers=1, n_heads=8, n_heads_cross=4, n_latent_tokens=16, latent_width=16, gene_bias=False
    )
    vae = VAE(config, n_genes=n_genes).eval().requires_grad_(False)
    vae.gene_embedding.normal_()
    dit = DiT(
        DiTConfig(d_model=256, n_layers=2, n_heads=8),
        n_latent_tokens=16,
        latent_width=16,
        n_classes=vocabulary.n_classes,
    )
    dit.eval().requires_grad_(False)
    for p in dit.parameters():
        p.add_(0.02 * torch.randn_like(p))
    sizes = LibrarySizes({"all": LogNormal(8.0, 0.4, 100)})
    recipe = Recipe(
        stops=np.array([60, 100, 150, 300]),
        conditions={"a": np.array([0, 3, 1, 2]), "b": np.array([2, 1, 2, 0])},
        scale={JOINT: np.array([1.0, 2.0, 1.0, 1.5])} if dit.strategy == "joint" else
        {"a": np.array([1.0, 2.0, 1.0, 1.5]), "b": np.array([1.0, 1.0, 3.0, 1.0])},
        log_mean=np.full(4, 8.0), log_sd=np.array([0.4, 0.0, 0.4, 0.4]),
    )  # fmt: skip
    flow = LoadedFlow(dit, PathConfig(), vocabulary, sizes, 16, 16)
    return CellMaker(
        LoadedVAE(vae, vocabulary, sizes), flow, recipe, sampler=SamplerConfig(solver="midpoint", steps=2), seed=5
    )


def test_batches_of_any_size_give_the_same_counts_and_latents(realistic):
    ids, counts, latents = by_ids(realistic, [0, 256])
    assert ids.tolist() == list(range(256))
    assert (counts > 0).sum(1).mean() > 500
    for size, first, last in ((64, 0, 256), (7, 24, 73), (1, 30, 36), (100, 50, 250)):
        cuts = [*range(first, last, size), last]
        part_ids, part_counts, part_latents = by_ids(realistic, cuts)
        np.testing.assert_array_equal(part_ids, ids[first:last])
        np.testing.assert_array_equal(part_counts, counts[first:last], err_msg=f"batches of {size}")
        np.testing.assert_array_equal(part_latents, latents[first:last], err_msg=f"batches of {size}")


@pytest.fixture
def models(tmp_path):
    labels = (CELL_TYPES, DONORS)
    return load_vae(write_vae(tmp_path / "vae", *labels)), load_flow(write_flow(tmp_path / "flow", *labels))


def maker(models, *, n=64, seed=1, genes=None, log_sd=0.3, sampler=None, scale=1.0) -> CellMaker:
    labels = [CELL_TYPES, DONORS]
    scales = (
        {JOINT: np.array([scale])} if models[1].dit.strategy == "joint" else {x.name: np.array([scale]) for x in labels}
    )
    recipe = Recipe(np.array([n]), {x.name: np.array([0]) for x in labels}, scales, np.array([5.0]), np.array([log_sd]))
    return CellMaker(*models, recipe, sampler=sampler or SamplerConfig(), seed=seed, genes=genes)


def test_a_subset_of_genes_keeps_their_counts(models):
    _, whole, _ = by_ids(maker(models), [0, 64])
    _, part, _ = by_ids(maker(models, genes=np.array([1, 4])), [0, 64])
    np.testing.assert_array_equal(part, whole[:, [1, 4]])
    assert whole.shape == (64, len(GENES))


def test_a_library_size_without_deviation_is_that_number(models):
    cells = next(maker(models, log_sd=0.0).cells(0, 32))
    assert (cells.library_size == round(np.exp(5.0))).all()
    drawn = np.concatenate([c.library_size for c in maker(models, n=4000).cells(0, 4000)])
    assert np.log(drawn).mean() == pytest.approx(5.0, abs=0.03)
    assert np.log(drawn).std() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    "choices", [{"solver": "euler"}, {"steps": 3}, {"solver": "dopri5", "rtol": 1e-2, "atol": 1e-2}]
)
def test_solver_steps_and_tolerance_take_effect(models, choices):
    _, _, latents = by_ids(maker(models), [0, 32])
    _, _, other = by_ids(maker(models, sampler=SamplerConfig(**choices)), [0, 32])
    assert not np.array_equal(latents, other)


def test_guidance_takes_effect(models):
    _, _, one = by_ids(maker(models), [0, 32])
    _, _, two = by_ids(maker(models, scale=2.0), [0, 32])
    assert abs(one - two).max() > 1e-3


def test_temperature_scales_what_exceeds_the_poisson(models):
    hot, cold = (
        by_ids(maker(models, n=2048, log_sd=0.0, sampler=SamplerConfig(temperature=t)), [0, 2048]) for t in (9.0, 1e-6)
    )
    np.testing.assert_array_equal(hot[2], cold[2])
    means = np.concatenate([t.mu for t in maker(models, n=2048, log_sd=0.0).decoded(0, 2048)])
    np.testing.assert_allclose(hot[1].mean(0), means.mean(0), rtol=0.2, atol=0.1)
    assert ((cold[1] - means) ** 2).sum() == pytest.approx(means.sum(), rel=0.1)  # a Poisson: variance = mean
    assert ((hot[1] - means) ** 2).sum() > 2 * means.sum()


@pytest.mark.parametrize("strategy", ["joint", "mutually_exclusive"])
def test_scales_per_cell_equal_separate_requests(strategy):
    torch.manual_seed(1)
    dit = DiT(DiTConfig(d_model=16, n_layers=1, n_heads=2, strategy=strategy), n_latent_tokens=3, latent_width=4,
              n_classes={"a": 3, "b": 2})  # fmt: skip
    dit.requires_grad_(False)
    for p in dit.parameters():
        p.normal_(std=0.3)
    conditions = {"a": torch.tensor([0, 3, 2, 3, 1]), "b": torch.tensor([1, 0, 2, 2, 0])}
    w = {"a": torch.tensor([1.0, 9.0, 2.0, 9.0, 0.0]), "b": torch.tensor([1.0, 0.5, 9.0, 9.0, 2.0])}
    scale = {JOINT: torch.tensor([1.0, 0.5, 2.0, 9.0, 0.0])} if strategy == "joint" else w
    x, t = torch.randn(5, 3, 4), torch.full((5,), 0.3)
    found = per_cell_prediction(dit, conditions, scale, one_time=True)(x, t)
    for i in range(5):
        given = {k: v[i : i + 1] for k, v in conditions.items() if v[i] != dit.n_classes[k]}
        own = float(scale[JOINT][i]) if strategy == "joint" else {k: float(w[k][i]) for k in given}
        alone = guided_prediction(dit, given, scale=own)(x[i : i + 1], t[:1])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_labels_that_a_cell_lacks_cost_nothing():
    batch_sizes = []

    class Spy:
        n_classes, strategy = {"a": 3, "b": 5}, "mutually_exclusive"

        def __call__(self, x, t, conditions):
            batch_sizes.append(len(x))
            return x

    conditions = {"a": torch.tensor([0, 3, 3]), "b": torch.tensor([5, 1, 5])}
    ones = {"a": torch.ones(3), "b": torch.ones(3)}
    x = torch.randn(3, 2, 2)
    torch.testing.assert_close(per_cell_prediction(Spy(), conditions, ones)(x, torch.zeros(3)), x)
    assert batch_sizes == [3]


def test_scales_must_name_every_label():
    class Spy:
        n_classes, strategy = {"a": 3}, "mutually_exclusive"

    with pytest.raises(ValueError, match=r"scales must be given for \['a'\]"):
        per_cell_prediction(Spy(), {"a": torch.tensor([0])}, {JOINT: torch.ones(1)})


def test_a_model_without_labels_generates(tmp_path, models):
    names = vocabulary(CELL_TYPES, DONORS)
    assert names.n_classes == {"cell_type": 3, "donor": 2}
    recipe = Recipe(np.array([5]), {}, {}, np.array([3.0]), np.array([0.1]))
    cells = list(CellMaker(*models, recipe, sampler=SamplerConfig(), seed=0).cells(0, 5))
    assert [len(c.cell_ids) for c in cells] == [5]
