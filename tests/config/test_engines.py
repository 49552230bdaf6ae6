"""Engine sections: what each role adds to the common keys."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.engines import EngineSection, LoraSection, PolicySection, ReferenceSection, ValueSection


def test_defaults_run_on_a_laptop():
    section = EngineSection()
    assert (section.dtype, section.deepspeed, section.ranks, section.gpus_per_rank, section.trust_remote_code) == (
        "fp32",
        "",
        1,
        0.0,
        False,
    )


def test_the_policy_needs_a_model_the_others_start_from_it():
    with pytest.raises(ValidationError, match="model"):
        PolicySection()  # type: ignore[call-arg]
    assert ReferenceSection().model == "" and ValueSection().model == ""


def test_the_value_model_has_a_learning_rate_of_its_own():
    assert ValueSection().optim.lr != PolicySection(model="m").optim.lr
    assert ValueSection().head_init == "zero"


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32"}, {"ranks": 0}, {"cpus_per_rank": 0}, {"gpus_per_rank": -0.5}, {"microbatch_tokens": 0}, {"attention": "fast"}],
)
def test_ranges(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        EngineSection(**changes)


def test_any_engine_may_pack_and_none_does_unasked():
    sections = [
        PolicySection(model="m", packing=True),
        ValueSection(packing=True),
        ReferenceSection(packing=True),
        EngineSection(packing=True),
    ]
    assert all(section.packing for section in sections) and not EngineSection().packing


def test_lora_targets_are_names_or_all_linear():
    assert LoraSection(target_modules=["q_proj"]).target_modules == ["q_proj"]
    assert LoraSection().target_modules == "all-linear"
    with pytest.raises(ValidationError):
        LoraSection(target_modules="q_proj")
    with pytest.raises(ValidationError, match="r\n"):
        LoraSection(r=0)
