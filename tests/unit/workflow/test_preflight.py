"""What is wrong with a job is said before anything of it runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.models.label_values import number
from helpers.models.small_models import write_flow, write_vae

from pipeline.config.context import StageContext
from pipeline.config.io.loader import load_job
from pipeline.config.job import (
    EvaluateConfig,
    GenerateConfig,
    IngestConfig,
    TrainFlowConfig,
    TrainVaeConfig,
    TrainVaeJob,
)
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.controls import check_controls
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.planning.plan import plan
from pipeline.planning.sizes import data_facts, generated_cells
from pipeline.stages import ingest
from pipeline.workflow.preflight import _trains, check_against_data, check_settings
from pipeline.workflow.runner import run_job
from pipeline.workflow.schedule import resolve
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

JOBS = Path(__file__).resolve().parents[3] / "jobs"


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("ingest")
    config = IngestConfig.model_validate(
        {"source": {"type": "synthetic", "n_cells": 200, "n_genes": 40, "n_types": 3}, "split": {"test": 0}}
    )
    facts = ingest.run(config, StageContext(folder, {}, 0, SimpleNamespace(), None))
    return Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0)


def test_lanes_workers_and_batch_must_fit_and_all_that_do_not_is_said_at_once():
    job = load_job(JOBS / "demo.yaml", ["train_vae.train.feed.lanes=3", "generate={like: train, per_label: {a: 1}}"])
    with pytest.raises(InputError) as error:
        check_settings(job)
    message = str(error.value)
    assert "train_vae.train.feed.lanes (3) must be a multiple of resources.workers (2)" in message
    assert "set train_vae.train.feed.batch_size=66" in message
    assert "generate takes one of" in message


def test_triton_without_a_gpu_and_options_that_are_ours_are_said_before_the_start(tmp_path):
    options = tmp_path / "options.json"
    options.write_text('{"gradient_clipping": 1}')
    job = load_job(JOBS / "demo.yaml", ["train_vae.train.decoder=triton", f"train_flow.train.deepspeed={options}"])
    with pytest.raises(InputError) as error:
        check_settings(job)
    assert "train_vae.train.decoder (triton) needs a GPU in every worker" in str(error.value)
    assert "sets gradient_clipping, which train.optimizer.clip decides" in str(error.value)
    check_settings(load_job(JOBS / "demo.yaml", ["train_vae.train.decoder=triton", "resources.gpus_per_worker=1"]))


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [(0.5, "NCCL refuses workers that share a GPU"), (2, "uses one GPU, the others stay idle"), (1.5, "stay idle")],
)
def test_training_takes_one_gpu_per_worker_or_none_and_every_stage_that_trains_is_named(gpus, reason):
    with pytest.raises(InputError, match=reason) as error:
        check_settings(load_job(JOBS / "demo.yaml", [f"resources.gpus_per_worker={gpus}"]))
    assert f"resources.gpus_per_worker ({gpus:g}) must be 0 or 1 for train_vae and train_flow" in str(error.value)
    for allowed in (0, 1):
        check_settings(load_job(JOBS / "demo.yaml", [f"resources.gpus_per_worker={allowed}"]))


@pytest.mark.parametrize("gpus", [0.5, 2])
def test_actors_of_a_batch_job_may_share_a_gpu_or_hold_several(gpus):
    for job in ("encode", "generate"):
        check_settings(load_job(JOBS / f"{job}.yaml", [f"resources.gpus_per_worker={gpus}"]))


def test_a_vae_that_is_used_as_it_is_trains_nothing_and_takes_any_share_of_a_gpu():
    given = {"kind": "train_vae", "name": "x", "pretrained": "somewhere", "resources": {"gpus_per_worker": 0.5}}
    config = TrainVaeJob.model_construct(**given)
    assert not _trains(config)
    assert _trains(TrainVaeJob.model_validate({"kind": "train_vae", "name": "x"}))


def test_a_range_of_workers_must_divide_the_lanes_whatever_it_comes_to():
    job = load_job(JOBS / "demo.yaml", ["resources.workers={min: 1, max: 3}"])
    with pytest.raises(
        InputError,
        match=r"lanes \(4\) must be a multiple of .*every number from 1 to 3\); set train_vae.train.feed.lanes=6",
    ):
        check_settings(job)
    check_settings(load_job(JOBS / "demo.yaml", ["resources.workers={min: 1, max: 2}"]))
    with pytest.raises(InputError, match=r"min \(3\) must not be more than max \(2\)"):
        load_job(JOBS / "demo.yaml", ["resources.workers={min: 3, max: 2}"])


def test_cautious_steps_that_depend_on_the_number_of_workers_are_refused_with_a_range():
    changed = ["resources.workers={min: 1, max: 2}", "train_vae.train.optimizer.cautious=true"]
    with pytest.raises(InputError, match=r"set train_vae\.train\.zero_stage=0"):
        check_settings(load_job(JOBS / "demo.yaml", changed))
    check_settings(load_job(JOBS / "demo.yaml", [*changed, "train_vae.train.zero_stage=0"]))


@pytest.mark.row("D:unknown-category-at-generation")
def test_a_class_that_was_never_measured_is_refused_as_soon_as_the_data_is_known(ingested):
    wanted = GenerateConfig(cells=[{"cell_type": "neuron", "n_cells": 1}])
    with pytest.raises(InputError, match="no class 'neuron'"):
        check_against_data({"generate": wanted}, ingested)
    check_against_data({"generate": GenerateConfig(like="train")}, ingested)


def test_a_split_without_cells_is_said_before_training(ingested):
    with pytest.raises(InputError, match=r"raise ingest\.split\.test"):
        check_against_data({"evaluate": EvaluateConfig(split="test")}, ingested)


# ---- plan refuses what run refuses -------------------------------------------------------------------------------
INGEST = "kind: ingest\nname: demo\nsource: {type: synthetic, n_cells: 200, n_genes: 40}\nsplit: {test: 0}\n"
WRONG = [
    ("cell_type,cells\ntype 1,3\n", "has no column n_cells"),
    ("cell_type,n_cells\ntype 1,5.5\n", "must be whole numbers >= 0; 1 are not, the first in row 1 ('5.5')"),
    ('cell_type,n_cells\ntype 1,"1,000"\n', "('1,000'); write it with digits only"),
    ("cell_type,n_cells\ntype 1,\n", "must be whole numbers >= 0"),
    ("Cell_Type,n_cells\ntype 1,3\n", "no label 'Cell_Type' (did you mean 'cell_type'?)"),
    ("cell_type,n_cells\nneuron,3\n", "has no class 'neuron'"),
    ("x,cell_type,n_cells\na,type 1\n", "line 2 has 2 fields and the header 3"),
]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A folder in which the job `demo` was ingested."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "ingest.yaml").write_text(f"{INGEST}output: {folder}/runs\n")
    run_job(load_job(folder / "ingest.yaml", []), folder / "ingest.yaml")
    return folder


def planned(folder, table: str, **more) -> str:
    (folder / "conditions.csv").write_text(table)
    path = folder / "job.yaml"
    job = {"kind": "generate", "name": "demo", "output": str(folder / "runs")}
    path.write_text(yaml.safe_dump({**job, "conditions": str(folder / "conditions.csv"), **more}))
    return plan(resolve(load_job(path, []), path))


@pytest.mark.parametrize(("table", "words"), WRONG)
def test_a_plan_resolves_the_request_of_a_known_ingest(pipeline_folder, table, words):
    with pytest.raises(InputError) as error:
        planned(pipeline_folder, table)
    assert words in str(error.value)
    assert "conditions.csv" in str(error.value)


def test_a_plan_counts_the_cells_of_a_request(pipeline_folder):
    said = planned(pipeline_folder, "\ufeffcell_type;n_cells\r\n;30\r\n;12.0\r\n")
    assert "generate: 42 cells in 1 shards" in said
    assert "needs train_vae" in said


@pytest.mark.parametrize(("table", "words"), [w for w in WRONG if "no class" not in w[1]])
def test_a_plan_of_all_stages_checks_what_needs_no_data(tmp_path, table, words):
    (tmp_path / "conditions.csv").write_text(table)
    wanted = [f"output={tmp_path}/runs", f"generate={{conditions: {tmp_path}/conditions.csv}}"]
    with pytest.raises(InputError) as error:
        plan(resolve(load_job(JOBS / "demo.yaml", wanted)))
    assert words in str(error.value)
    inline = [f"output={tmp_path}/runs", "generate={cells: [{cell_type: x, n_cells: 2.5}]}"]
    with pytest.raises(InputError, match=r"generate.cells: n_cells must be whole"):
        plan(resolve(load_job(JOBS / "demo.yaml", inline)))
    unknown = [f"output={tmp_path}/runs", "generate={per_label: {tissue: 2}}"]
    with pytest.raises(InputError, match=r"per_label: no label 'tissue'; the model will know: cell_type"):
        plan(resolve(load_job(JOBS / "demo.yaml", unknown)))


GAUSSIAN = "train_vae.model.head=gaussian"


def test_what_only_counts_have_is_refused_for_a_gaussian_head_before_anything_is_trained(ingested):
    job = load_job(JOBS / "demo.yaml", [GAUSSIAN, "generate.library_size=500", "generate.sampler.temperature=0.5"])
    with pytest.raises(InputError) as error:
        check_settings(job)
    assert "generate: library_size (500): the VAE has a gaussian head" in str(error.value)
    assert "generate: temperature (0.5): the VAE has a gaussian head" in str(error.value)
    check_settings(load_job(JOBS / "demo.yaml", [GAUSSIAN]))
    check_settings(load_job(JOBS / "demo.yaml", ["generate.library_size=500"]))


def test_a_library_size_in_a_table_is_refused_for_a_gaussian_head_once_the_data_are_known(ingested):
    configs = {
        "train_vae": TrainVaeConfig.model_validate({"model": {"head": "gaussian"}}),
        "generate": GenerateConfig.model_validate({"cells": [{"n_cells": 3, "library_size": 500}]}),
    }
    with pytest.raises(InputError, match="library_size in row 1 of the conditions: the VAE has a gaussian head"):
        check_against_data(configs, ingested)


def test_a_start_from_a_model_of_other_genes_ends_before_any_worker_starts(ingested, tmp_path):
    """Genes are known when ingest has finished: no training group is started for cells that the model does not know."""
    foreign = write_vae(tmp_path / "vae")
    config = TrainVaeConfig.model_validate({"start_from": {"model": str(foreign)}})
    with pytest.raises(
        InputError, match=r"train_vae.start_from.model: .*vae: none of the 40 genes is among the model's"
    ):
        check_against_data({"train_vae": config}, ingested)


@pytest.mark.parametrize(("made", "words"), [(False, "is not there"), (True, "has no finished ingest")])
def test_old_cells_of_a_place_that_has_none_are_refused_by_validate(tmp_path, made, words):
    if made:
        (tmp_path / "old" / "generate").mkdir(parents=True)
    settings = f"ingest.replay={{pipeline: {tmp_path / 'old'}, share: 0.2}}"
    with pytest.raises(InputError, match=f"ingest.replay.pipeline: .*{words}"):
        check_settings(load_job(JOBS / "demo.yaml", [settings]))


# ---- control cells that a flow starts at -------------------------------------------------------------------------
CD4, CD8 = (f"CD{n}-positive, alpha-beta T cell" for n in (4, 8))


def screen(folder: Path, kept: str | None = None, labels: Any = ("cell_type", "donor_id"), **more: Any) -> Manifest:
    """Cells of two types and three donors; `kept` says which, as a filter."""
    config = IngestConfig.model_validate(
        {
            "source": {"type": "synthetic", "n_cells": 200, "n_genes": 40, "n_types": 2, "n_donors": 3},
            "labels": list(labels), "split": {"test": 0}, "obs_filter": kept, **more,
        }
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    facts = ingest.run(config, StageContext(folder, {}, 0, SimpleNamespace(), None))
    return Manifest("ingest", "v", str(folder), {"filter": kept}, {}, facts, 0.0, 0.0)


def started(**control: str) -> TrainFlowConfig:
    return TrainFlowConfig.model_validate({"start": {"control": control}})


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"drug": "none"}, "train_flow.start.control: no label 'drug'"),
        ({"cell_type": "type 9"}, "cell_type has no class 'type 9'"),
    ],
)
def test_controls_that_the_data_do_not_know_are_refused_when_the_data_are(tmp_path, control, words):
    with pytest.raises(InputError, match=words):
        check_against_data({"train_flow": started(**control)}, screen(tmp_path))


def test_treated_cells_without_controls_start_at_noise_and_are_counted(tmp_path):
    data = IngestedDataset.open(screen(tmp_path, f"cell_type != '{CD4}' or donor_id != 'donor 1'"))
    treated = data.composition("train").query(f"cell_type == '{CD8}' and donor_id == 'donor 1'")["n_cells"].sum()
    [note] = check_controls(started(cell_type=CD4).start, data)
    assert note.startswith(f"{treated} training cells have no control cells (cell_type {CD4})")
    assert f"donor_id donor 1 ({treated} cells)" in note
    assert check_controls(started(cell_type=CD8).start, data) == []


def test_controls_that_no_treated_cell_shares_its_other_labels_with_are_refused(tmp_path):
    ingested = screen(
        tmp_path,
        f"(cell_type == '{CD4}' and donor_id == 'donor 1') or (cell_type == '{CD8}' and donor_id != 'donor 1')",
    )
    with pytest.raises(InputError, match="no combination of donor_id has both"):
        check_against_data({"train_flow": started(cell_type=CD4)}, ingested)
    check_against_data({"train_flow": TrainFlowConfig()}, ingested)
    alone = screen(tmp_path / "alone", ingested.config["filter"], labels=["cell_type"])
    check_against_data({"train_flow": started(cell_type=CD4)}, alone)


def test_a_control_class_that_is_held_out_is_refused(tmp_path):
    held_out = {"held_out": {"combinations": [{"cell_type": CD4}], "split": "validation"}}
    ingested = screen(tmp_path, split={"test": 0, **held_out})
    with pytest.raises(InputError, match=f"no training cell has cell_type '{CD4}'.*name another class"):
        check_against_data({"train_flow": started(cell_type=CD4)}, ingested)


def test_a_class_that_held_out_combinations_leave_without_training_cells_is_refused_before_training(tmp_path):
    held_out = {"held_out": {"combinations": [{"cell_type": CD4}], "split": "validation"}}
    ingested = screen(tmp_path, split={"test": 0, **held_out})
    with pytest.raises(InputError, match=f"leaves no training cells to cell_type '{CD4}'.*hold fewer"):
        check_against_data({"train_flow": TrainFlowConfig()}, ingested)
    check_against_data({"train_vae": TrainVaeConfig()}, ingested)  # a VAE has no labels
    fewer = {"held_out": {"combinations": [{"cell_type": CD4, "donor_id": ["donor 1", "donor 2"]}]}}
    check_against_data({"train_flow": TrainFlowConfig()}, screen(tmp_path / "fewer", split={"test": 0, **fewer}))


def test_held_out_combinations_without_control_cells_are_refused_before_training(tmp_path):
    """A report of shifts cannot say anything of them; those that have control cells pass."""
    where = {"cell_type": [CD4, CD8], "donor_id": "donor 1"}
    ingested = screen(tmp_path, split={"validation": 0.1, "test": 0.1, "held_out": {"combinations": [where]}})
    known = Vocabulary.load(Path(ingested.folder) / "vocabulary.json")
    flow = {"start_from": {"model": str(write_flow(tmp_path / "flow", *known.labels))}}  # which knows donor 1
    flow = TrainFlowConfig.model_validate(flow)
    compared = {"train_flow": flow, "evaluate": EvaluateConfig(control={"cell_type": CD4})}
    words = f"no training cells of the control .cell_type {CD4}. with the same donor_id.*{CD8}, donor_id donor 1. Hold"
    with pytest.raises(InputError, match=words):
        check_against_data(compared, ingested)
    check_against_data({"evaluate": compared["evaluate"]}, ingested)  # nothing is trained: the report names them
    only_one = {"held_out": {"combinations": [where | {"cell_type": CD8}]}}
    with_controls = screen(tmp_path / "one", split={"validation": 0.1, "test": 0.1, **only_one})
    check_against_data({**compared, "train_flow": TrainFlowConfig()}, with_controls)


def test_a_control_of_evaluate_that_the_data_do_not_know_is_refused_when_the_data_are(tmp_path):
    ingested = screen(tmp_path, split={"validation": 0.1, "test": 0.1})
    config = EvaluateConfig(control={"drug": "none", "cell_type": "type 9"})
    with pytest.raises(InputError) as error:
        check_against_data({"evaluate": config}, ingested)
    assert "evaluate.control.drug: no label 'drug'" in str(error.value)
    assert "evaluate.control.cell_type: cell_type has no class 'type 9'" in str(error.value)


def test_control_labels_that_the_job_does_not_ingest_are_refused_before_anything_runs():
    wrong = ["train_flow.start={control: {cell_typ: B}}", "evaluate.control={drug: none}"]
    with pytest.raises(InputError) as error:
        check_settings(load_job(JOBS / "demo.yaml", wrong))
    assert "train_flow.start.control: ingest.labels has no label 'cell_typ' (did you mean 'cell_type'?" in str(
        error.value
    )
    assert "evaluate.control: ingest.labels has no label 'drug' (there are: " in str(error.value)


def test_a_plan_does_not_count_held_out_cells_before_ingest_does(tmp_path):
    job = load_job(JOBS / "perturbation_demo.yaml", [f"output={tmp_path}"])
    facts = data_facts(None, job.ingest)
    assert generated_cells(job.generate, facts) is None
    by_hash = job.ingest.model_copy(update={"split": job.ingest.split.model_copy(update={"held_out": None})})
    assert generated_cells(job.generate, data_facts(None, by_hash)) is not None


def test_labels_that_a_flow_cannot_take_over_are_refused_before_a_vae_is_trained(tmp_path):
    ingested = screen(tmp_path, labels=["cell_type"])
    old = write_flow(tmp_path / "flow", number("cell_type"))
    config = TrainFlowConfig.model_validate({"start_from": {"model": str(old)}})
    with pytest.raises(InputError, match=r"train_flow.start_from.model: .*label cell_type is classes in the data"):
        check_against_data({"train_vae": TrainVaeConfig(), "train_flow": config}, ingested)
