"""`rollout`: by default the sampled distribution is the trained one."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.rollout import RolloutSection


def test_nothing_is_cut_off_the_distribution_by_default():
    section = RolloutSection()
    assert (section.temperature, section.top_k, section.top_p, section.stop_strings) == (1.0, 0, 1.0, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"max_new_tokens": 0},
        {"prompts_per_step": 0},
        {"samples_per_prompt": 0},
        {"slots": 0},
        {"shards_per_rank": 0},
        {"max_staleness": -1},
        {"engine": "other"},
        {"ranks": -1},
        {"ranks": 1, "weight_sync": "shared"},
        {"ranks": 1, "cpus_per_rank": 0},
        {"ranks": 1, "gpus_per_rank": -1},
    ],
)
def test_ranges(changes):
    with pytest.raises(ValidationError, match=list(changes)[-1]):
        RolloutSection(**changes)


@pytest.mark.parametrize(
    "changes", [{"cpus_per_rank": 2}, {"gpus_per_rank": 0.5}, {"python": "/opt/vllm/bin/python"}, {"weight_sync": "ipc"}]
)
def test_what_only_ranks_of_their_own_have_is_refused_without_them(changes):
    with pytest.raises(ValidationError, match=f"{next(iter(changes))} would change nothing.*set rollout.ranks"):
        RolloutSection(**changes)
    assert RolloutSection(ranks=1, **changes)


def test_vllm_has_processes_of_its_own():
    with pytest.raises(ValidationError, match=r"set rollout\.ranks to 1 or more"):
        RolloutSection(engine="vllm")
    assert RolloutSection(engine="vllm", ranks=1)


@pytest.mark.parametrize("changes", [{"top_k": 5}, {"top_p": 0.9}])
def test_vllm_has_no_filters(changes):
    with pytest.raises(ValidationError, match="switch them off"):
        RolloutSection(engine="vllm", ranks=1, **changes)
