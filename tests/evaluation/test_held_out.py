from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch, StopReason
from rlhf_dist.evaluation.held_out import HeldOutSamples, paired_differences, samples_from_rollouts, summarise
from rlhf_dist.evaluation.proportion import clustered_share
from rlhf_dist.runs.rollout_log import read_rollouts, write_rollouts

STOP, CUT = StopReason.STOP_TOKEN, StopReason.LENGTH

SAMPLES = HeldOutSamples(
    prompt_ids=[1, 1, 2, 3],
    scores=[0.0, 1.0, 2.0, None],
    rewards={"joy": [1.0, 1.0, None, None], "never": [None] * 4},
    lengths=[2, 4, 6, 8],
    stop_reasons=[STOP, CUT, StopReason.STOP_STRING, CUT],
    kl=[1.0, 3.0, 4.0, 6.0],
)


def test_means_by_hand() -> None:
    result = summarise(SAMPLES)
    assert (result.prompts, result.samples) == (3, 4)
    assert result.metrics() == {
        "eval/score": 1.25,
        "eval/rewards/joy": 1.0,
        "eval/kl": 4.0,
        "eval/length": pytest.approx((3 + 6 + 8) / 3),
        "eval/stop_rate": 0.5,
        "eval/missing/score": 1.0,
        "eval/missing/rewards/joy": 2.0,
        "eval/missing/rewards/never": 4.0,
    }
    assert (result.score.n, result.score.clusters) == (3, 2)
    assert result.means["rewards/joy"].low is None


def test_the_dict_is_json_and_nested() -> None:
    values = json.loads(json.dumps(summarise(SAMPLES).to_dict(), allow_nan=False))
    assert values["score"]["mean"] == 1.25 and values["score"]["clusters"] == 2
    assert set(values["rewards"]) == {"joy"}
    assert values["missing"] == {"score": 1, "rewards/joy": 2, "rewards/never": 4}
    assert set(values) == {"prompts", "samples", "score", "rewards", "kl", "length", "stop_rate", "missing"}


def test_without_kl_there_is_no_kl_rather_than_zero() -> None:
    result = summarise(dataclasses.replace(SAMPLES, kl=None))
    assert "kl" not in result.means and "eval/kl" not in result.metrics()


def test_no_scores_at_all_is_an_error() -> None:
    with pytest.raises(UserError, match="no held-out completion has a score"):
        summarise(dataclasses.replace(SAMPLES, scores=[None] * 4))
    with pytest.raises(UserError, match="no held-out"):
        summarise(HeldOutSamples([], [], {}, [], []))


def test_bad_lists() -> None:
    with pytest.raises(ValueError, match="rewards/joy has 1 values for 4"):
        summarise(dataclasses.replace(SAMPLES, rewards={"joy": [1.0]}))
    with pytest.raises(ValueError, match="nan"):
        summarise(dataclasses.replace(SAMPLES, scores=[float("nan")] * 4))


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_rollout_file_gives_the_same_result(tmp_path: Path, with_reference: bool) -> None:
    mask = torch.arange(8) < torch.tensor(SAMPLES.lengths)[:, None]
    kl = torch.tensor(SAMPLES.kl)[:, None] / torch.tensor(SAMPLES.lengths)[:, None]
    batch = ExperienceBatch(
        prompt_tokens_BP=torch.ones(4, 1, dtype=torch.long),
        prompt_mask_BP=torch.ones(4, 1, dtype=torch.bool),
        response_tokens_BT=torch.ones(4, 8, dtype=torch.long),
        response_mask_BT=mask,
        response_attention_BT=mask,
        prompt_id_B=torch.tensor(SAMPLES.prompt_ids),
        sample_index_B=torch.tensor([0, 1, 0, 0]),
        policy_version_B=torch.zeros(4, dtype=torch.long),
        stop_reason_B=torch.tensor(SAMPLES.stop_reasons),
        rollout_logprobs_BT=torch.zeros(4, 8),
        prompts=("p",) * 4,
        completions=("c",) * 4,
        old_logprobs_BT=kl.expand(4, 8),
        ref_logprobs_BT=torch.zeros(4, 8) if with_reference else None,
    )
    details = {"score": SAMPLES.scores} | {f"reward/{name}": values for name, values in SAMPLES.rewards.items()}
    write_rollouts(tmp_path / "a.parquet", batch, details)
    found = summarise(samples_from_rollouts(read_rollouts(tmp_path / "a.parquet"))).metrics()
    expected = SAMPLES if with_reference else dataclasses.replace(SAMPLES, kl=None)
    assert found == pytest.approx(summarise(expected).metrics(), rel=1e-6)


def test_paired_differences_by_hand() -> None:
    after = dataclasses.replace(SAMPLES, scores=[1.0, 1.0, None, 5.0], rewards={"joy": [0.0, 2.0, 1.0, None]}, kl=[2.0, 2.0, 2.0, 2.0])
    differences = paired_differences(SAMPLES, after)
    assert set(differences) == {"score", "rewards/joy", "kl", "length", "stop_rate"}  # "never" has no pair
    assert differences["score"].mean == 0.5 and differences["score"].n == 2  # the third sample lost its score, the fourth had none
    assert differences["rewards/joy"].mean == 0.0
    assert differences["kl"].mean == pytest.approx(((1 + -1) / 2 + -2 + -4) / 3)
    assert (differences["length"].mean, differences["length"].low) == (0.0, 0.0)


def test_unlike_samples_are_not_paired() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        paired_differences(SAMPLES, dataclasses.replace(SAMPLES, prompt_ids=[1, 2, 2, 3]))


def test_the_stop_rate_is_a_share_and_its_change_a_difference_of_shares() -> None:
    few = HeldOutSamples([1, 2, 3, 4], [0.0] * 4, {}, [1] * 4, [STOP, STOP, STOP, CUT])
    rate = summarise(few).means["stop_rate"]
    assert rate == clustered_share([1.0, 1.0, 1.0, 0.0], [1, 2, 3, 4]) and rate.high is not None and 0.75 < rate.high <= 1
    before = dataclasses.replace(few, stop_reasons=[CUT, STOP, STOP, STOP])
    change = paired_differences(before, few)["stop_rate"]
    assert change.mean == 0 and change.low is not None and change.high is not None and -1 <= change.low < 0 < change.high <= 1
