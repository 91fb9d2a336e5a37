"""Which cells of a flow's training start at control cells: the same for any workers, micro batches and restarts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.config.job import TrainFlowConfig
from pipeline.config.train import FlowStartConfig
from pipeline.data.loading.blocks import IpcBlocks
from pipeline.data.loading.order import FeedOrder
from pipeline.training.objectives.base import MicroBatchIndex
from pipeline.training.objectives.controls import ControlStarts, read_controls
from pipeline.training.objectives.flow import Draws, FlowBatch, FlowDraws, flow_losses
from scldm.data.vocabulary import LabelVocabulary, UnknownNameError, Vocabulary
from scldm.flow.config import PathConfig
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT

SHAPE, N = (3, 2), 230
DRUG, PATIENT = LabelVocabulary("drug", ("A", "B", "none")), LabelVocabulary("patient", ("p0", "p1", "p2"))
VOCABULARY = Vocabulary(("g",), ("G",), (DRUG, PATIENT))
START = FlowStartConfig(control={"drug": "none"}, share=0.5)
# A third of the cells are controls, but none of the last patient's.
PATIENTS = np.arange(N) * 7 % 3
DRUGS = np.where(PATIENTS == 2, np.arange(N) // 3 % 2, np.arange(N) // 3 % 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> IpcBlocks:
    folder = tmp_path_factory.mktemp("latents")
    values = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
    table = pa.table(
        {
            "soma_joinid": np.arange(N),
            "label:drug": DRUGS.astype(np.int32),
            "label:patient": PATIENTS.astype(np.int32),
            "log_library_size": np.ones(N, np.float32),
            "latent": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 6),
        }
    )
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    return IpcBlocks(str(folder), (("a.arrow", N),), tile=8)


def order_of(source) -> FeedOrder:
    return FeedOrder(source.ids, source.tile, 0, 16, 4, 16)  # 4 rows of a lane in a step, rounds of 4 steps


def read(source, **more):
    return read_controls(source, START.model_copy(update=more), VOCABULARY, shape=SHAPE, seed=0)


def draws(source, rank, world_size, seed=0, share=0.5) -> FlowDraws:
    order = order_of(source)
    lanes = order.lanes_of(rank, world_size)
    starts = ControlStarts(read(source), source, order, lanes, share=share, seed=seed)
    return FlowDraws(seed, order, lanes, latent_shape=SHAPE, n_labels=2, controls=starts)


def by_row(source, step, world_size, micro, **more) -> dict[tuple[int, int], Draws]:
    """Return the draws of each (lane, row) of a step, for a number of workers and a micro batch size."""
    order, found = order_of(source), {}
    at, q = order.locate(step), order.rows_per_lane
    for rank in range(world_size):
        lanes = order.lanes_of(rank, world_size)
        rows = [(lane, at.batch * q + i) for lane in lanes for i in range(q)]
        own = draws(source, rank, world_size, **more)
        for start in range(0, len(rows), micro):
            part = own.for_micro_batch(MicroBatchIndex(step, at.epoch, start), min(micro, len(rows) - start))
            found |= {row: part.rows(k, 1) for k, row in enumerate(rows[start : start + micro])}
    return found


@pytest.mark.parametrize("step", [0, 6, 14, 20])
def test_starts_do_not_depend_on_workers_or_micro_batches(source, step):
    one, two, four = (by_row(source, step, w, micro) for w, micro in ((1, 16), (2, 3), (4, 1)))
    assert one.keys() == two.keys() == four.keys()
    for row in one:
        for other in (two[row], four[row]):
            assert torch.equal(one[row].x0, other.x0)
            assert torch.equal(one[row].from_control, other.from_control)


def test_a_restart_in_the_middle_of_a_round_draws_the_same(source):
    own = draws(source, 0, 1)
    through = [own.for_micro_batch(MicroBatchIndex(step, 0, 0), 16) for step in range(8)]
    again = draws(source, 0, 1).for_micro_batch(MicroBatchIndex(6, 0, 0), 16)
    assert torch.equal(again.x0, through[6].x0)


def test_a_cell_starts_at_noise_or_at_a_control_cell_of_its_patient(source):
    order, own = order_of(source), draws(source, 0, 1, share=1.0)
    controls = {tuple(x.flatten().tolist()): i for i, x in enumerate(read(source).latents)}
    patients = np.concatenate([[g[0]] * len(rows) for g, rows in sorted(read(source).rows.items())])
    for step in range(4):
        drawn = own.for_micro_batch(MicroBatchIndex(step, 0, 0), 16)
        ids = np.concatenate([order.block(0, 0, lane)[0][step * 4 : step * 4 + 4] for lane in range(4)])
        assert drawn.from_control.tolist() == (PATIENTS[ids] != 2).tolist(), "the last patient has no controls"
        for id_, x0, is_control in zip(ids, drawn.x0, drawn.from_control, strict=True):
            place = controls.get(tuple(x0.flatten().tolist()))
            assert (place is not None) == bool(is_control)
            assert place is None or patients[place] == PATIENTS[id_]


def test_about_the_share_of_the_cells_starts_at_controls_and_the_others_keep_their_noise(source):
    order = order_of(source)
    plain = FlowDraws(0, order, range(4), latent_shape=SHAPE, n_labels=2)
    own, found = draws(source, 0, 1), []
    for step in range(14):
        index = MicroBatchIndex(step, 0, 0)
        a, b = own.for_micro_batch(index, 16), plain.for_micro_batch(index, 16)
        assert torch.equal(a.x0[~a.from_control], b.x0[~a.from_control])
        assert torch.equal(a.t, b.t)
        found.append(a.from_control.float().mean())
    assert float(torch.stack(found).mean()) == pytest.approx(0.5 * 2 / 3, abs=0.1)


def test_another_seed_starts_other_cells_elsewhere(source):
    one, other = (draws(source, 0, 1, seed=s).for_micro_batch(MicroBatchIndex(0, 0, 0), 16) for s in (0, 1))
    assert not torch.equal(one.from_control, other.from_control)


def test_validation_cells_start_at_the_same_controls_however_they_are_batched(source):
    rng = np.random.default_rng(1)
    joinids = torch.from_numpy(rng.permutation(40))
    latents = torch.from_numpy(rng.normal(size=(40, *SHAPE)).astype(np.float32))
    conditions = {"drug": torch.arange(40) % 3, "patient": torch.arange(40) % 2}
    own = draws(source, 0, 1)

    def started(order, size):
        batches = [
            FlowBatch(latents[i], {k: v[i] for k, v in conditions.items()}, own.for_validation(joinids[i]),
                      joinids[i], torch.ones(len(i)))
            for i in order.split(size)
        ]  # fmt: skip
        return {int(j): x for b in own.started(batches) for j, x in zip(b.joinids, b.draws.x0, strict=True)}

    one, two = started(torch.arange(40), 40), started(torch.arange(39, -1, -1), 7)
    assert all(torch.equal(one[j], two[j]) for j in one)


def test_a_group_with_many_controls_keeps_a_part_drawn_by_seed(source):
    few, again = read(source, cells_per_group=5), read(source, cells_per_group=5)
    assert [len(rows) for rows in few.rows.values()] == [5, 5]
    assert torch.equal(few.latents, again.latents)
    whole = {tuple(x.flatten().tolist()) for x in read(source).latents}
    assert {tuple(x.flatten().tolist()) for x in few.latents} < whole


def test_an_unknown_control_class_is_named(source):
    with pytest.raises(UnknownNameError, match="no class 'nothing'"):
        read(source, control={"drug": "nothing"})


def test_the_loss_trains_the_vector_of_the_cells_that_start_at_controls(source):
    dit = DiT(DiTConfig(d_model=16, n_layers=1, n_heads=2), n_latent_tokens=3, latent_width=2,
              n_classes=VOCABULARY.n_classes, from_controls=True)  # fmt: skip
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    drawn = draws(source, 0, 1).for_micro_batch(MicroBatchIndex(0, 0, 0), 16)
    conditions = {"drug": torch.zeros(16).long(), "patient": torch.zeros(16).long()}
    flow_losses(dit, torch.randn(16, *SHAPE), drawn, conditions, PathConfig()).sum().backward()
    assert dit.from_controls.grad.abs().sum() > 0


CONTROL = {"control": {"drug": "none"}}


@pytest.mark.parametrize(
    ("section", "message", "fix"),
    [
        ({"start": {"control": {}}}, "at least 1", {"start": CONTROL}),
        ({"start": {"control": {"drug": "none", "patient": "p0"}}}, "at most 1", {"start": CONTROL}),
        ({"start": {**CONTROL, "share": 0}}, "greater than 0", {"start": {**CONTROL, "share": 1}}),
        ({"start": CONTROL, "vae": {"train": True}}, "leave one of them out", {"vae": {}}),
        ({"start": CONTROL, "flow": {"prediction": "noise"}}, "flow.prediction=velocity",
         {"flow": {"prediction": "velocity", "path": "gvp"}}),
        ({"start": CONTROL, "flow": {"path": "vp"}}, "flow.path=linear", {"flow": {"path": "linear"}}),
        ({"start": {**CONTROL, "share": 1}, "train": {"sample_every": 1}}, "lower start.share", {"start": CONTROL}),
        ({"start": {**CONTROL, "share": 1}, "train": {"sample_every": 1}}, "leave train.sample_every out",
         {"train": {}}),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_together_are_refused_and_the_advice_works(section, message, fix):
    with pytest.raises(ValueError, match=message):
        TrainFlowConfig.model_validate(section)
    TrainFlowConfig.model_validate({**section, **fix})


def test_a_flow_from_noise_keeps_the_settings_it_had_before():
    assert "start" not in TrainFlowConfig().model_dump()
