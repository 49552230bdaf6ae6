"""YAML and overrides into a config: values, precedence, and errors that name the nearest key."""

import pytest
import yaml

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config, load_config
from rlhf_dist.config.ppo import PPOConfig

CONFIG = """
data: {train: prompts.jsonl}
policy:
  model: tiny
  optim: {lr: 3.0e-4}
reward:
  sources:
    - {kind: function, name: length, path: "rewards.py:length"}
    - {kind: model, name: judge, model: classifier, weight: 0.1}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "ppo.yaml"
    file.write_text(CONFIG)
    return file


def refusal(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, path, overrides)
    return caught.value


def test_the_file_gives_values_and_the_command_line_wins(path):
    config = load_config(PPOConfig, path, ["policy.ranks=2", "policy.optim.lr=0.5", "policy.optim.lr=0.25"])
    assert config.policy.model == "tiny" and config.policy.ranks == 2
    assert config.policy.optim.lr == 0.25


def test_a_plain_float_with_an_exponent_is_a_number(path):
    assert load_config(PPOConfig, path, ["policy.optim.lr=1e-5"]).policy.optim.lr == 1e-5
    assert load_config(PPOConfig, path, ["algorithm.kl.coef=5E-2"]).algorithm.kl.coef == 0.05


def test_an_override_may_enter_a_list_a_mapping_or_null(path):
    config = load_config(
        PPOConfig,
        path,
        ["reward.sources.1.weight=2", "rollout.stop_strings=['. ', END]", "policy.lora={r: 4}", "algorithm.value_clip=null"],
    )
    assert [source.weight for source in config.reward.sources] == [1.0, 2.0]
    assert config.rollout.stop_strings == [". ", "END"]
    assert config.policy.lora is not None and config.policy.lora.r == 4
    assert config.algorithm.value_clip is None


def test_nothing_behind_the_sign_is_the_empty_text_for_a_key_that_takes_text(path):
    config = load_config(
        PPOConfig, path, ["policy.deepspeed=zero.json", "policy.deepspeed=", "algorithm.value_clip=", "reward.sources.1.name=j"]
    )
    assert config.policy.deepspeed == "" and config.algorithm.value_clip is None
    assert load_config(PPOConfig, path, ["policy.deepspeed=", "policy.deepspeed=z.json"]).policy.deepspeed == "z.json"
    assert "policy.ranks: Input should be a valid integer" in str(refusal(path, "policy.ranks="))
    assert "policy.deepspeed: Input should be a valid string" in str(refusal(path, "policy.deepspeed=null")), "null is said"


def test_an_override_may_open_a_section_that_the_file_leaves_empty(tmp_path):
    file = tmp_path / "ppo.yaml"
    file.write_text(CONFIG + "run:\n")
    assert load_config(PPOConfig, file, ["run.steps=3"]).run.steps == 3


def test_a_value_keeps_equal_signs(path):
    assert load_config(PPOConfig, path, ["data.prompt_field=a=b"]).data.prompt_field == "a=b"


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("rolout.slots=2", "rolout", "rollout"),
        ("policy.optim.lear_rate=1", "policy.optim.lear_rate", None),
        ("policy.optim.warmup_step=1", "policy.optim.warmup_step", "warmup_steps"),
        ("algorithm.kl.coeff=1", "algorithm.kl.coeff", "coef"),
        ("reward.missing_stop.rul=none", "reward.missing_stop.rul", "rule"),
        ("policy.lora.alfa=1", "policy.lora.alfa", "alpha"),
        ("reward.sources.0.wieght=2", "reward.sources.0.wieght", "weight"),
        ("reward.sources.1.transfrom=logit", "reward.sources.1.transfrom", "transform"),
    ],
)
def test_a_typo_is_refused_and_names_the_nearest_key(path, override, key, nearest):
    message = str(refusal(path, override))
    assert f"{key}: no such key" in message
    if nearest:
        assert f"did you mean {nearest!r}?" in message
    else:
        assert "there are betas" in message and "warmup_steps" in message


def test_the_nearest_key_of_one_kind_of_reward_is_not_a_key_of_the_other_kind(path):
    assert "did you mean 'transform'" not in str(refusal(path, "reward.sources.0.transfrom=logit"))


def test_a_wrong_value_inside_a_union_is_named_as_it_is_written(path):
    assert "reward.sources.1.weight: Input should be a valid number" in str(refusal(path, "reward.sources.1.weight=heavy"))


def test_every_mistake_is_listed_with_file_and_advice(path):
    error = refusal(path, "run.steps=0", "policy.dtype=fp8", "rollout.slot=1")
    assert error.where == str(path)
    for line in (
        "run.steps: Input should be greater",
        "policy.dtype: Input should be 'fp32', 'bf16' or 'fp16'",
        "rollout.slot: no such key",
    ):
        assert line in error.what
    assert "rlhf-dist config show" in error.fix


def test_a_check_over_sections_reads_as_a_sentence(path):
    assert "Value error" not in str(refusal(path, "algorithm.minibatches=65"))


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("run.steps", "not an override"),
        ("=3", "not an override"),
        ("run.steps=[1", "is not YAML"),
        ("reward.sources.2.weight=1", "the list has 2 entries"),
        ("reward.sources.first.weight=1", "'first' names none"),
        ("reward.sources.7={}", "the list has 2 entries"),
        ("policy.model.name=x", "policy.model is a value, not a section"),
        ("reward.sources.0.weight.x=1", None),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(path, override, what):
    error = refusal(path, override)
    assert error.where and error.fix
    if what:
        assert what in error.what


def test_a_missing_file_names_itself(tmp_path):
    error = refusal(tmp_path / "no.yaml")
    assert "cannot read the config file" in error.what and error.where.endswith("no.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- a list\n- of two", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    file = tmp_path / "ppo.yaml"
    file.write_text(text)
    assert refusal(file).where == str(file)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    file = tmp_path / "ppo.yaml"
    file.write_bytes(b"\xff\xfe\x00\x80")
    assert "not YAML" in refusal(file).what


def test_what_is_dumped_loads_again_with_every_default_written_out(path, tmp_path):
    config = load_config(PPOConfig, path, ["policy.optim.lr=1e-5", "policy.lora={}", "rollout.stop_strings=['é\\n']"])
    text = dump_config(config)
    file = tmp_path / "resolved.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(PPOConfig, file) == config
    assert list(yaml.safe_load(text)) == list(PPOConfig.model_fields)
    assert yaml.safe_load(text)["algorithm"]["kl"]["target"] == 6.0
