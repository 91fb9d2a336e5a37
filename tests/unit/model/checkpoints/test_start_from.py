"""A network that starts from another one's weights does what that one did, as far as genes and labels allow."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, random_weights, write_flow, write_vae

from scldm.checkpoints.native import LoadedVAE, load_flow, load_vae
from scldm.checkpoints.start_from import EMBEDDINGS, adapt, freeze, slow_down, start_flow, start_vae
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import CheckpointError
from scldm.flow.config import ControlStart
from scldm.flow.transport import FromControls
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE
from scldm.optim.config import LoraConfig
from scldm.optim.rates import SlowedPart, piece_factor, slowed


def names(genes=GENES, *labels: LabelVocabulary) -> Vocabulary:
    return Vocabulary(tuple(genes), tuple(genes), labels or (CELL_TYPES,))


@pytest.fixture
def trained(tmp_path):
    return load_vae(write_vae(tmp_path / "vae", input="count_aware", gene_bias=True, genes_seq_len=None))


def new_vae(like: VAE, n_genes: int, **choices) -> VAE:
    vae = VAE(like.config.model_copy(update=choices), n_genes=n_genes)
    vae.start_at(torch.arange(1.0, n_genes + 1))
    return vae


def test_with_the_same_genes_all_weights_are_taken_over(trained):
    vae = new_vae(trained.vae, len(GENES))
    started = start_vae(vae, trained.vocabulary, trained)
    assert all(torch.equal(x, trained.vae.state_dict()[k]) for k, x in vae.state_dict().items())
    assert started.parameters == sum(x.numel() for x in vae.state_dict().values())
    assert started.genes == {"kept": 6, "new": 0, "dropped": 0}
    assert all(p.requires_grad for p in vae.parameters())


def test_genes_are_matched_by_id_and_new_ones_start_at_the_mean_of_the_others(trained):
    genes = ["g4", "other", "g1", "g0"]
    vae, old = new_vae(trained.vae, 4), trained.vae
    level = vae.gene_bias.detach().clone()
    started = start_vae(vae, names(genes), trained)
    assert started.genes == {"kept": 3, "new": 1, "dropped": 3}
    assert torch.equal(vae.gene_embedding[[0, 2, 3]], old.gene_embedding[[4, 1, 0]])
    assert torch.allclose(vae.gene_embedding[1], old.gene_embedding.mean(0))
    assert torch.equal(vae.gene_bias[[0, 2, 3]], old.gene_bias[[4, 1, 0]])
    moved = (old.gene_bias[[4, 1, 0]] - level[[0, 2, 3]]).mean()
    assert torch.allclose(vae.gene_bias[1], level[1] + moved)
    assert torch.equal(vae.log_theta[1], old.log_theta.median())
    assert started.lines()[0].endswith("genes: 3 kept, 1 new, 3 dropped")


def test_another_head_starts_new_and_all_else_is_taken_over(trained):
    vae = new_vae(trained.vae, len(GENES), head="nb_cell")
    started = start_vae(vae, trained.vocabulary, trained)
    assert started.new == ["decoder.head.weight", "decoder.head.bias"]
    assert started.dropped == ["log_theta"]
    assert torch.equal(vae.gene_embedding, trained.vae.gene_embedding)


@pytest.mark.parametrize(
    ("choices", "genes", "words"),
    [
        ({"d_model": 16}, GENES, r"gene_embedding is \(6, 16\) here and \(6, 8\) in the model.*leave the sizes"),
        ({"n_layers": 2}, GENES, "the networks differ in encoder.*leave the settings of `model` out"),
        ({}, ["ENSG1", "ENSG2"], r"none of the 2 genes is among the model's 6 \(here ENSG1, ENSG2, there g0, g1\)"),
    ],
    ids=["width", "layers", "genes"],
)
def test_what_cannot_be_taken_over_is_refused_and_nothing_is_guessed(trained, choices, genes, words):
    vae = new_vae(trained.vae, len(genes), **choices)
    with pytest.raises(CheckpointError, match=words):
        start_vae(vae, names(genes), trained)


# ---- the flow ----------------------------------------------------------------------------------------------------
@pytest.fixture
def flow(tmp_path):
    return load_flow(write_flow(tmp_path / "flow", CELL_TYPES, DONORS))


def new_dit(like: DiT, *labels: LabelVocabulary) -> DiT:
    n_classes = {x.name: len(x.classes) for x in labels}
    return random_weights(DiT(like.config, n_latent_tokens=3, latent_width=4, n_classes=n_classes), seed=9)


def prediction(dit: DiT, **conditions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 3, 4, generator=generator), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        return dit(x_t, t, {k: torch.tensor([v, v]) for k, v in conditions.items()})


def test_old_classes_keep_their_embeddings_and_new_ones_start_at_the_null_class_or_a_parent(flow):
    types = LabelVocabulary("cell_type", ("B", "NKT", "T", "new"))
    dit = new_dit(flow.dit, types, DONORS)
    started = start_flow(dit, names(GENES, types, DONORS), flow, parents={"cell_type": {"NKT": "NK"}})
    for here, there in ((0, 1), (1, 2), (2, 0), (3, 3), (4, 3)):  # B, NKT as NK, T, new as null, null
        expected = prediction(flow.dit, cell_type=there, donor=1)
        assert torch.allclose(prediction(dit, cell_type=here, donor=1), expected, atol=1e-6)
    assert started.classes["cell_type"] == {
        "kept": 2, "new": ["NKT", "new"], "dropped": ["NK"], "parents": {"NKT": "NK"},
    }  # fmt: skip
    assert "cell_type: 2 classes kept, 2 new (NKT, new), 1 dropped (NK)" in started.lines()


def test_a_label_that_is_dropped_leaves_the_flow_of_cells_without_it(flow):
    dit = new_dit(flow.dit, CELL_TYPES)
    started = start_flow(dit, names(GENES, CELL_TYPES), flow)
    expected = prediction(flow.dit, cell_type=1, donor=len(DONORS.classes))
    assert torch.allclose(prediction(dit, cell_type=1), expected, atol=1e-6)
    assert started.dropped == ["labels.label_donor.weight"]


def test_a_new_label_changes_nothing_at_first(flow):
    tissue = LabelVocabulary("tissue", ("gut", "lung"))
    dit = new_dit(flow.dit, CELL_TYPES, DONORS, tissue)
    started = start_flow(dit, names(GENES, CELL_TYPES, DONORS, tissue), flow)
    expected = prediction(flow.dit, cell_type=2, donor=0)
    for tissue_id in range(3):
        assert torch.allclose(prediction(dit, cell_type=2, donor=0, tissue=tissue_id), expected, atol=1e-6)
    assert started.new == ["labels.label_tissue.weight"]


def dit_with_controls(like: DiT) -> DiT:
    n_classes = {x.name: len(x.classes) for x in (CELL_TYPES, DONORS)}
    dit = DiT(like.config, n_latent_tokens=3, latent_width=4, n_classes=n_classes, from_controls=True)
    return random_weights(dit, seed=9)


def from_controls(dit: DiT, **conditions: int) -> torch.Tensor:
    """The prediction of the field that starts at control cells."""
    return prediction(FromControls(dit), **conditions)


def test_a_field_from_controls_is_taken_over_with_its_vector(tmp_path):
    start = ControlStart(label="donor", control="d1", share=0.5)
    parent = load_flow(write_flow(tmp_path / "flow", CELL_TYPES, DONORS, start=start))
    dit = dit_with_controls(parent.dit)
    started = start_flow(dit, names(GENES, CELL_TYPES, DONORS), parent)
    assert torch.equal(from_controls(dit, cell_type=1, donor=1), from_controls(parent.dit, cell_type=1, donor=1))
    assert started.new == started.dropped == []


def test_a_flow_from_noise_gives_a_flow_from_controls_its_field(flow):
    dit = dit_with_controls(flow.dit)
    torch.nn.init.zeros_(dit.from_controls)  # as a new network has it
    started = start_flow(dit, names(GENES, CELL_TYPES, DONORS), flow)
    assert torch.equal(from_controls(dit, cell_type=1, donor=1), prediction(flow.dit, cell_type=1, donor=1))
    assert started.new == ["from_controls"]


def test_a_flow_from_controls_gives_a_flow_from_noise_its_field_from_noise(tmp_path):
    start = ControlStart(label="donor", control="d1", share=0.5)
    parent = load_flow(write_flow(tmp_path / "flow", CELL_TYPES, DONORS, start=start))
    dit = new_dit(parent.dit, CELL_TYPES, DONORS)
    started = start_flow(dit, names(GENES, CELL_TYPES, DONORS), parent)
    assert torch.equal(prediction(dit, cell_type=1, donor=1), prediction(parent.dit, cell_type=1, donor=1))
    assert "dropped parameters: from_controls" in started.lines()


@pytest.mark.parametrize(
    ("parents", "words"),
    [
        ({"tissue": {"a": "b"}}, "parents.tissue: the model has no label tissue; it has cell_type, donor"),
        ({"cell_type": {"X": "NK"}}, "parents.cell_type: the data have no class 'X'"),
        ({"cell_type": {"T": "Q"}}, "parents.cell_type: the model has no class 'Q'"),
    ],
)
def test_parents_that_are_not_there_are_refused(flow, parents, words):
    with pytest.raises(CheckpointError, match=words):
        start_flow(new_dit(flow.dit, CELL_TYPES, DONORS), names(GENES, CELL_TYPES, DONORS), flow, parents=parents)


# ---- parts that are not trained ----------------------------------------------------------------------------------
def test_parts_are_frozen_by_the_beginning_of_their_names(trained):
    vae = new_vae(trained.vae, len(GENES))
    names = freeze(vae, ["encoder", "gene_embedding"])
    assert names == sorted(n for n, p in vae.named_parameters() if not p.requires_grad)
    assert all(n.startswith("encoder.") or n == "gene_embedding" for n in names)
    assert vae.log_theta.requires_grad


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["encode"], "the network has no part 'encode' .*encoder"),
        (["encoder", "decoder", "gene_embedding", "gene_bias", "log_theta"], "leaves nothing to train"),
    ],
)
def test_parts_that_are_not_there_and_a_network_that_is_frozen_whole_are_refused(trained, parts, words):
    with pytest.raises(CheckpointError, match=words):
        freeze(new_vae(trained.vae, len(GENES)), parts)


# ---- learning rates ----------------------------------------------------------------------------------------------
def adamw_by_hand(before, grad, rate, *, decay=0.1, steps=3):
    """AdamW with a constant gradient and a rate for each element: the moments, corrected, are those of one gradient."""
    p = before
    for _ in range(steps):
        p = p - rate * (decay * p + grad / (grad.abs() + 1e-8))
    return p


def train_slowly(module, rates, *, steps=3):
    """Step by torch's AdamW; each parameter's gradient is all 0.5."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.1)
    parts = []
    for name, factor in rates.items():
        values = trained[name].detach().view(-1)
        row = len(values) // len(trained[name])
        parts.append(SlowedPart(values, piece_factor(factor, row_size=row, start=0, numel=len(values))))
    for _ in range(steps):
        for p in trained.values():
            p.grad = torch.full_like(p, 0.5)
        with slowed(parts):
            optimizer.step()


def test_old_rows_move_at_their_own_rate_and_new_ones_at_the_full_one(trained):
    genes = ["g4", "other", "g1", "g0"]
    vae = new_vae(trained.vae, 4)
    started = start_vae(vae, names(genes), trained)
    rates = slow_down(vae, 0.25, started)
    before = {n: p.detach().clone() for n, p in vae.named_parameters()}
    train_slowly(vae, rates)
    rate = torch.tensor([0.025, 0.1, 0.025, 0.025])  # `other` is new
    for name, p in vae.named_parameters():
        own = rate if name in ("log_theta", "gene_bias") else rate[:, None] if name in EMBEDDINGS else 0.025
        expected = adamw_by_hand(before[name], torch.full_like(p, 0.5), own)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6, msg=name)
    assert started.facts()["old_learning_rate"] == 0.25
    json.dumps(started.facts())


def test_old_classes_and_the_null_class_are_old_and_a_class_that_starts_at_a_parent_is_new(flow):
    types = LabelVocabulary("cell_type", ("B", "NKT", "T", "new"))
    tissue = LabelVocabulary("tissue", ("gut", "lung"))
    dit = new_dit(flow.dit, types, tissue)
    started = start_flow(dit, names(GENES, types, tissue), flow, parents={"cell_type": {"NKT": "NK"}})
    rates = slow_down(dit, 0.5, started)
    assert rates["labels.label_cell_type.weight"].tolist() == [0.5, 1.0, 0.5, 1.0, 0.5]
    assert "labels.label_tissue.weight" not in rates
    assert rates["input.weight"] == 0.5
    assert set(rates) == {n for n, _ in dit.named_parameters()} - {"labels.label_tissue.weight"}


def test_another_head_is_new(trained):
    vae = new_vae(trained.vae, len(GENES), head="nb_cell")
    rates = slow_down(vae, 0.1, start_vae(vae, trained.vocabulary, trained))
    assert not {"decoder.head.weight", "decoder.head.bias"} & set(rates)
    assert rates["gene_embedding"] == 0.1


def test_adapters_have_the_full_rate_and_what_is_frozen_has_none(trained):
    vae = new_vae(trained.vae, len(GENES))
    started = start_vae(vae, trained.vocabulary, trained)
    adapt(vae, LoraConfig(rank=2), started, seed=0)
    assert set(slow_down(vae, 0.1, started)) == {"log_theta", "gene_bias"}
    other = new_vae(trained.vae, len(GENES))
    started = start_vae(other, trained.vocabulary, trained)
    freeze(other, ["encoder", "gene_embedding"])
    assert not [n for n in slow_down(other, 0.1, started) if n.startswith("encoder.") or n == "gene_embedding"]


def test_a_rate_for_nothing_that_is_trained_is_refused(flow):
    tissue = LabelVocabulary("tissue", ("gut", "lung"))
    dit = new_dit(flow.dit, tissue)
    started = start_flow(dit, names(GENES, tissue), flow)
    adapt(dit, LoraConfig(rank=2), started, seed=0)
    with pytest.raises(CheckpointError, match=r"start_from.old_learning_rate \(0.1\).*nothing of it is trained"):
        slow_down(dit, 0.1, started)
    assert slow_down(dit, None, started) == {}


def test_a_start_that_would_load_next_to_nothing_is_refused(trained):
    genes = ["g4", *(f"x{i}" for i in range(60))]
    many = LoadedVAE(
        VAE(trained.vae.config, n_genes=61), names(["g4", *(f"y{i}" for i in range(60))]), trained.library_sizes
    )
    with pytest.raises(CheckpointError, match=r"1 of the 61 genes is among the model's 61 .* a start needs 10%"):
        start_vae(new_vae(trained.vae, 61), names(genes), many)
    with pytest.raises(CheckpointError, match="none of the 2 genes is among the model's 6"):
        start_vae(new_vae(trained.vae, 2), names(["a", "b"]), trained)
    assert start_vae(new_vae(trained.vae, 61), names(genes), trained).genes["kept"] == 1  # of the model's 6
