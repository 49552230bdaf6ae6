"""Raw DeepSpeed files: `auto` filled, contradictions refused, and every file of configs/deepspeed/ accepted by DeepSpeed itself."""

import json
from pathlib import Path

import pytest

from rlhf_dist.config.deepspeed import resolve_deepspeed, zero_stage
from rlhf_dist.config.errors import UserError

FILES = sorted((Path(__file__).resolve().parents[2] / "configs" / "deepspeed").glob("*.json"))
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}


def trained_stage(path, dtype):
    """Half precision without sharding is raised to stage 1; everything else is as the file says."""
    return max(STAGES[path.stem], int(dtype != "fp32"))


def write(tmp_path, **config):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


def resolve(path, dtype="fp32", clip_norm=1.0, trains=True):
    return resolve_deepspeed(path, dtype=dtype, clip_norm=clip_norm, trains=trains)


def autos(value):
    if isinstance(value, dict):
        return [key for k, v in value.items() for key in autos(v)]
    return [value] if value == "auto" else []


def test_the_six_files_are_there():
    assert {path.stem for path in FILES} == set(STAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_each_file_resolves_for_a_training_engine(path, dtype):
    config = resolve(str(path), dtype, clip_norm=0.5)
    assert not autos(config)
    assert zero_stage(config) == trained_stage(path, dtype)
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (dtype == "bf16", dtype == "fp16")
    assert (config["gradient_clipping"], config["gradient_accumulation_steps"], config["train_micro_batch_size_per_gpu"]) == (0.5, 1, 1)
    assert ("offload_optimizer" in config["zero_optimization"]) == path.stem.endswith("offload")
    assert ("offload_param" in config["zero_optimization"]) == (path.stem == "zero3_offload")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_engine_that_only_runs_forward_is_sharded_by_stage_3_alone(path):
    config = resolve(str(path), trains=False)
    assert zero_stage(config) == (3 if STAGES[path.stem] == 3 else 0)
    assert "offload_optimizer" not in config["zero_optimization"]
    assert ("offload_param" in config["zero_optimization"]) == (path.stem == "zero3_offload")


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_accepts_every_file(path, trains):
    runtime = pytest.importorskip("deepspeed.runtime.config")
    for dtype in ("fp32", "bf16"):
        parsed = runtime.DeepSpeedConfig(resolve(str(path), dtype, trains=trains))
        stage = trained_stage(path, dtype) if trains else 3 * (STAGES[path.stem] == 3)
        assert parsed.zero_config.stage == stage
        assert parsed.gradient_clipping == 1.0


def test_no_file_means_stage_0_and_stage_1_when_half_precision_trains():
    assert zero_stage(resolve("", "bf16")) == 1 and zero_stage(resolve("", "bf16", trains=False)) == 0
    config = resolve("")
    assert zero_stage(config) == 0 and not config["bf16"]["enabled"] and not config["fp16"]["enabled"]


def test_what_the_user_wrote_stays(tmp_path):
    path = write(tmp_path, zero_optimization={"stage": 2, "reduce_bucket_size": 7}, wall_clock_breakdown=True, steps_per_print=5)
    config = resolve(path)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7 and config["wall_clock_breakdown"] and config["steps_per_print"] == 5


def test_values_that_agree_with_the_config_are_accepted(tmp_path):
    path = write(tmp_path, bf16={"enabled": True}, gradient_clipping=1.0, train_batch_size="auto")
    config = resolve(path, "bf16")
    assert config["bf16"]["enabled"] is True and "train_batch_size" not in config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "sets 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets 'scheduler'"),
        ({"train_batch_size": 64}, "fixes train_batch_size"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4, the config says 1"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps = 8, the config says 1"),
        ({"gradient_clipping": 0.3}, "gradient_clipping = 0.3, the config says 1.0"),
        ({"bf16": {"enabled": True}}, "enabled = True, the config says False"),
        ({"fp16": {"enabled": True}}, "enabled = True, the config says False"),
    ],
)
def test_a_contradiction_is_refused_with_the_file_and_the_cure(tmp_path, content, message):
    path = write(tmp_path, **content)
    with pytest.raises(UserError, match=message) as caught:
        resolve(path)
    assert path in caught.value.where and caught.value.fix


def test_bf16_in_the_config_contradicts_a_file_that_switches_it_off(tmp_path):
    path = write(tmp_path, bf16={"enabled": False})
    with pytest.raises(UserError, match="bf16") as caught:
        resolve(path, "bf16")
    assert "bf16" in caught.value.where


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", '"text"'])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"not JSON|must hold an object"):
        resolve(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the DeepSpeed file"):
        resolve(str(tmp_path / "no.json"))
