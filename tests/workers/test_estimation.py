"""From scored pieces to experience, against slow loops over rows and tokens; masked slots hold NaN throughout."""

import math

import pytest
import torch

from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.contracts.experience import ExperienceBatch, Piece, StopReason
from rlhf_dist.contracts.moments import Moments, merged_moments
from rlhf_dist.contracts.roles import EstimateRequest, ExperienceInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.workers.estimation import Estimator, Scored, behaviour_metrics, experience_metrics, on_policy_gaps, rollout_gap, token_kl

ROWS = [([5, 6], [7, 8, 2]), ([9], [10, 11, 12, 13]), ([14, 15], [2]), ([16], [17, 18])]
LENGTHS = [3, 4, 1, 2]
SCORES = (1.0, -0.5, 2.0, 0.25)
CUT = 1  # the row that the length limit cut
BETA, GAMMA, LAM = 0.3, 0.9, 0.8


@pytest.fixture
def shard(shard_of) -> ExperienceBatch:
    reasons = torch.full((4,), int(StopReason.STOP_TOKEN))
    reasons[CUT] = int(StopReason.LENGTH)
    batch = shard_of(ROWS, stop_reason_B=reasons)
    return batch.replace(rollout_logprobs_BT=poisoned(batch, 2))


def poisoned(batch: ExperienceBatch, seed: int) -> torch.Tensor:
    values = -torch.rand(batch.response_mask_BT.shape, generator=torch.Generator().manual_seed(seed)) - 0.1
    return torch.where(batch.response_mask_BT, values, torch.nan)


def pieces(shard: ExperienceBatch, *, values: bool = True) -> list[Piece]:
    """Old and reference log-probs, values and bootstrap values, each from two ranks."""
    fields = {"old_logprobs_BT": poisoned(shard, 3), "ref_logprobs_BT": poisoned(shard, 4)}
    if values:
        fields |= {"values_BT": poisoned(shard, 5), "bootstrap_value_B": torch.tensor([9.0, 0.7, 9.0, 9.0])}
    return [Piece(rows, {name: tensor[list(rows)]}) for name, tensor in fields.items() for rows in ((0, 2), (1, 3))]


def request(keep: tuple[bool, ...] = (True,) * 4, **options) -> EstimateRequest:
    scores = tuple(score if kept else math.nan for score, kept in zip(SCORES, keep, strict=True))
    return EstimateRequest(scores, {}, keep, BETA, options.pop("baseline", 0.0), **options)


def estimate(
    shard: ExperienceBatch, group: int = 1, asked: EstimateRequest | None = None, **config
) -> tuple[ExperienceBatch, ExperienceInfo]:
    section = AlgorithmSection(gamma=GAMMA, lam=LAM, **config)
    answer = Estimator(section, group)(asked or request(), shard, pieces(shard, values=section.estimator == "gae"))
    return answer.payload, answer.info


def kl_of(shard: ExperienceBatch, row: int, t: int) -> float:
    return float(poisoned(shard, 3)[row, t].double() - poisoned(shard, 4)[row, t].double())


def slow_gae(shard: ExperienceBatch, row: int, rewards: list[float], bootstrap: float) -> list[float]:
    values = [float(v) for v in poisoned(shard, 5)[row, : LENGTHS[row]]] + [bootstrap]
    deltas = [r + GAMMA * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((GAMMA * LAM) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def slow_rewards(shard: ExperienceBatch, row: int, score: float) -> list[float]:
    last = LENGTHS[row] - 1
    return [-BETA * kl_of(shard, row, t) + (score if t == last else 0.0) for t in range(LENGTHS[row])]


@pytest.mark.parametrize("truncated", ["terminal", "bootstrap"])
def test_gae_pays_the_score_at_the_last_token_or_bootstraps_a_cut_row(truncated, shard) -> None:
    batch, info = estimate(shard, truncated=truncated)
    values_BT = poisoned(shard, 5)
    for row, score in enumerate(SCORES):
        bootstrapped = truncated == "bootstrap" and row == CUT
        rewards = slow_rewards(shard, row, 0.0 if bootstrapped else score)
        want = slow_gae(shard, row, rewards, 0.7 if bootstrapped else 0.0)
        assert batch.advantages_BT[row, : LENGTHS[row]].tolist() == pytest.approx(want, abs=1e-6)
        returns = [a + float(values_BT[row, t]) for t, a in enumerate(want)]
        assert batch.returns_BT[row, : LENGTHS[row]].tolist() == pytest.approx(returns, abs=1e-6)
    mask = batch.response_mask_BT
    assert not batch.advantages_BT[~mask].any() and not batch.returns_BT[~mask].any()
    assert batch.score_B.tolist() == list(SCORES)  # the raw score stays, paid or not
    assert info.advantages.count == 10 and info.advantages.mean == pytest.approx(float(batch.advantages_BT[mask].double().mean()))
    assert info.advantages.variance == pytest.approx(float(batch.advantages_BT[mask].double().var()))


@pytest.mark.parametrize(("estimator", "group"), [("reinforce", 1), ("rloo", 2), ("grpo", 2), ("rloo", 4)])
def test_a_sequence_is_one_action_without_a_critic(estimator, group, shard) -> None:
    batch, info = estimate(shard, group, request(baseline=0.4), estimator=estimator)
    returns = [score - BETA * sum(kl_of(shard, row, t) for t in range(LENGTHS[row])) for row, score in enumerate(SCORES)]
    for row, mine in enumerate(returns):
        members = returns[row // group * group : row // group * group + group]
        mean = sum(members) / group
        std = math.sqrt(sum((r - mean) ** 2 for r in members) / (group - 1)) if group > 1 else 0.0
        others = (sum(members) - mine) / max(group - 1, 1)
        want = {"reinforce": mine - 0.4, "rloo": mine - others, "grpo": (mine - mean) / std if std else 0.0}[estimator]
        assert batch.advantages_BT[row, : LENGTHS[row]].tolist() == pytest.approx([want] * LENGTHS[row], abs=1e-5)
        assert batch.returns_BT[row, : LENGTHS[row]].tolist() == pytest.approx([mine] * LENGTHS[row], abs=1e-5)
    assert not batch.advantages_BT[~batch.response_mask_BT].any() and batch.values_BT is None
    assert info.token_rewards.count == 0


@pytest.mark.parametrize(("estimator", "group"), [("gae", 1), ("gae", 2), ("rloo", 2), ("grpo", 2), ("reinforce", 2)])
def test_dropped_groups_leave_no_trace(estimator, group, shard) -> None:
    """The NaN scores of dropped rows reach nothing, and the rows that stay get what they get without the others."""
    keep = (False, False, True, True)
    batch, info = estimate(shard, group, request(keep), estimator=estimator)
    whole, _ = estimate(shard, group, estimator=estimator)
    assert len(batch) == 2 and batch.completions == ("completion 2", "completion 3") and batch.response_tokens_BT.shape == (2, 2)
    for row, n in enumerate(LENGTHS[2:]):
        assert torch.equal(batch.advantages_BT[row, :n], whole.advantages_BT[row + 2, :n])
    assert info.response_lengths == info.valid_tokens == (1, 2) and info.prompt_lengths == (2, 1) and len(info.kl) == 2
    assert torch.isfinite(batch.advantages_BT).all() and all(math.isfinite(v) for v in info.tally.means().values())


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo", "reinforce"])
def test_a_shard_of_dropped_rows_is_empty_and_no_error(estimator, shard) -> None:
    batch, info = estimate(shard, 2, request((False,) * 4), estimator=estimator)
    assert len(batch) == 0 and info.kl == () and info.advantages.count == 0 and info.tally.means() == {}
    kept, _ = estimate(shard, 2, estimator=estimator)
    assert len(ExperienceBatch.concat([batch, kept])) == 4


def test_rewards_are_whitened_in_a_second_pass_with_the_moments_of_all_shards(shard) -> None:
    """First pass: moments of the token rewards. Second: rewards (x − μ) / σ + μ, then GAE."""
    _, first = estimate(shard, whiten_rewards=True)
    moments = merged_moments([first.token_rewards, Moments(3, 0.5, 2.0)])
    batch, second = estimate(shard, 1, request(reward_moments=moments), whiten_rewards=True)
    scale = 1 / math.sqrt(moments.variance + 1e-8)
    for row, score in enumerate(SCORES):
        rewards = [(r - moments.mean) * scale + moments.mean for r in slow_rewards(shard, row, score)]
        assert batch.advantages_BT[row, : LENGTHS[row]].tolist() == pytest.approx(slow_gae(shard, row, rewards, 0.0), abs=1e-5)
    flat = [r for row, score in enumerate(SCORES) for r in slow_rewards(shard, row, score)]
    assert first.token_rewards.count == 10 and first.token_rewards.mean == pytest.approx(sum(flat) / 10, abs=1e-6)
    assert second.token_rewards == first.token_rewards


def test_metrics_are_sums_over_the_rows_that_stay(shard) -> None:
    _, info = estimate(shard)
    means = info.tally.means()
    kl = [sum(kl_of(shard, row, t) for t in range(LENGTHS[row])) for row in range(4)]
    entropy = [-sum(float(poisoned(shard, 3)[row, t]) for t in range(LENGTHS[row])) for row in range(4)]
    deltas = [float(poisoned(shard, 3)[row, t]) - float(poisoned(shard, 2)[row, t]) for row in range(4) for t in range(LENGTHS[row])]
    gaps = [abs(delta) for delta in deltas]
    assert info.kl == pytest.approx(kl, abs=1e-6)
    assert means == pytest.approx(
        {
            "objective/kl": sum(kl) / 4,
            "objective/entropy": sum(entropy) / 4,
            "objective/non_score_reward": -BETA * sum(kl) / 4,
            "objective/rlhf_reward": (sum(SCORES) - BETA * sum(kl)) / 4,
            "val/response_length": 2.5,
            "val/behaviour_kl": sum(math.exp(delta) - 1 - delta for delta in deltas) / 10,
            "val/rollout_logprob_gap": sum(gaps) / 10,
            "val/rollout_logprob_gap_max": max(gaps),
        },
        abs=1e-6,
    )
    assert set(info.tally.weights.values()) == {4.0, 10.0}


def test_importance_weights_are_shown_where_they_are_used(shard) -> None:
    scored = shard.replace(old_logprobs_BT=poisoned(shard, 3))
    assert "val/importance_weight" not in behaviour_metrics(scored, None).means()
    means, valid = behaviour_metrics(scored, 1.2).means(), shard.response_mask_BT
    ratio = (poisoned(shard, 3)[valid].double() - poisoned(shard, 2)[valid].double()).exp()
    assert means["val/importance_weight"] == pytest.approx(float(ratio.clamp(max=1.2).mean()))
    assert means["val/importance_truncated"] == float((ratio > 1.2).double().mean()) > 0


@pytest.mark.parametrize(("old_logprobs", "cap", "shown"), [("recompute", 2.0, True), ("recompute", None, False), ("sampler", None, False)])
def test_old_log_probs_of_the_sampler_have_no_gap_to_it(old_logprobs, cap, shown, shard) -> None:
    answer = Estimator(AlgorithmSection(old_logprobs=old_logprobs), 1, cap)(request(), shard, pieces(shard))
    names = set(answer.info.tally.means())
    assert ("val/importance_weight" in names) is shown
    assert ("val/behaviour_kl" in names) is ("val/rollout_logprob_gap" in names) is (old_logprobs == "recompute")


def test_gaps_of_law_3_are_counted_over_valid_tokens_only(shard) -> None:
    filled = shard.replace(old_logprobs_BT=poisoned(shard, 3), ref_logprobs_BT=poisoned(shard, 4))
    tally, fresh = Tally(), poisoned(shard, 6)
    on_policy_gaps(filled, fresh, tally)
    means, valid = tally.means(), shard.response_mask_BT
    ratio = (fresh[valid].double() - filled.old_logprobs_BT[valid].double()).exp().sub(1).abs()
    assert means["ratio/mean"] == pytest.approx(float(ratio.mean())) and means["ratio/max"] == pytest.approx(float(ratio.max()))
    assert means["sampler/mean"] == pytest.approx(float(rollout_gap(filled).sum() / 10))
    assert means["reference/max"] == pytest.approx(float(token_kl(filled).abs().max()))
    still = Tally()
    on_policy_gaps(filled.replace(ref_logprobs_BT=poisoned(shard, 3)), poisoned(shard, 3), still)
    assert still.means()["ratio/max"] == still.means()["reference/max"] == 0.0


def test_gae_without_values_is_a_fault_and_no_silent_zero(shard) -> None:
    with pytest.raises(AssertionError):
        Estimator(AlgorithmSection(), 1)(request(), shard, pieces(shard, values=False))


def test_a_row_that_no_rank_computed_is_a_fault(shard) -> None:
    with pytest.raises(ValueError, match="computed by no rank"):
        Estimator(AlgorithmSection(), 1)(request(), shard, pieces(shard)[:-1])


def test_metrics_of_nothing_are_no_metrics(shard) -> None:
    empty = shard.select([]).replace(old_logprobs_BT=torch.zeros(0, 0))
    assert experience_metrics(Scored(empty, torch.zeros(0, 0), torch.zeros(0)), 0.1).means() == {}
    assert behaviour_metrics(empty, 2.0).means() == {}
