"""What DeepSpeed is told, and by whom."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from pipeline.config.deepspeed import DEFAULT_BUCKET, deepspeed_options, gradient_bucket
from pipeline.config.train import TrainConfig
from scldm.errors import InputError

N = 1000  # parameters


def options(gpu: bool = False, **train) -> dict:
    config = TrainConfig.model_validate(train)
    return deepspeed_options(config, n_parameters=N, micro_batch_size=8, accumulation=4, gpu=gpu)


def test_the_buffer_of_gradients_is_of_the_models_size_and_an_expert_may_set_another(tmp_path):
    """DeepSpeed would take 2 GB for a model of a thousand numbers."""
    assert gradient_bucket(N) == N
    assert gradient_bucket(10**12) == DEFAULT_BUCKET
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 77}}))
    assert options(deepspeed=str(file))["zero_optimization"]["reduce_bucket_size"] == 77


def test_batch_accumulation_clipping_stage_and_precision_come_from_our_settings():
    found = options(zero_stage=2, precision="bf16", optimizer={"clip": 1.5})
    assert found["train_micro_batch_size_per_gpu"] == 8
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 1.5
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": N}
    assert found["bf16"] == {"enabled": True}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_a_bf16_network_are_summed_in_fp32_over_micro_batches_and_workers(stage):
    found = options(zero_stage=stage, precision="bf16")
    assert found["communication_data_type"] == "fp32"
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}


def test_stage_0_sums_over_workers_in_fp32_and_accumulates_in_the_networks_precision_as_deepspeed_does():
    found = options(zero_stage=0, precision="bf16")
    assert found["communication_data_type"] == "fp32"
    assert "data_types" not in found
    assert not {"communication_data_type", "data_types"} & options(zero_stage=2, precision="fp32").keys()


def test_an_expert_may_sum_gradients_in_bf16(tmp_path):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"communication_data_type": "bf16"}))
    found = options(zero_stage=2, precision="bf16", deepspeed=str(file))
    assert found["communication_data_type"] == "bf16"
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}


def test_the_optimizer_is_offloaded_where_asked():
    assert options(zero_stage=2, offload_optimizer="cpu")["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(ValidationError, match="offload_optimizer \\(cpu\\) needs zero_stage 1, 2 or 3; got 0"):
        TrainConfig.model_validate({"zero_stage": 0, "offload_optimizer": "cpu"})


def test_an_experts_options_go_beside_ours(tmp_path):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}, "communication_data_type": "fp32"}))
    found = options(zero_stage=2, deepspeed=str(file))
    assert found["zero_optimization"] == {"overlap_comm": True, "stage": 2, "reduce_bucket_size": N}
    assert found["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"gradient_clipping": 1}, "sets gradient_clipping, which train.optimizer.clip decides"),
        ({"zero_optimization": {"stage": 3}}, "sets zero_optimization.stage, which train.zero_stage decides"),
        ({"scheduler": {}}, "sets scheduler, which train.optimizer decides"),
        ({"fp16": {"enabled": True}}, "sets fp16, which train.precision decides"),
    ],
)
def test_a_key_that_is_ours_is_refused_with_the_names_of_both(tmp_path, theirs, said):
    file = tmp_path / "options.json"
    file.write_text(json.dumps(theirs))
    with pytest.raises(InputError, match=said):
        options(deepspeed=str(file))


def test_all_faults_of_a_file_are_said_at_once(tmp_path):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"optimizer": {}, "zero_optimization": {"offload_optimizer": {}}}))
    with pytest.raises(InputError) as error:
        options(deepspeed=str(file))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[1]", "must hold a JSON object")])
def test_a_file_that_is_no_options_file_is_refused(tmp_path, text, said):
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        options(deepspeed=str(file))
    with pytest.raises(InputError, match="cannot be read"):
        options(deepspeed=str(tmp_path / "none.json"))
