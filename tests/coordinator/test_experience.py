from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments, merged_moments
from rlhf_dist.contracts.roles import EstimateRequest, ExperienceInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.coordinator.experience import Coefficients, estimate
from rlhf_dist.coordinator.judging import Judged
from rlhf_dist.coordinator.shards import Shard


class Policy:
    """Answers for kept rows only, with numbers that name the row: its score."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.requests: list[EstimateRequest] = []

    def estimate(self, request: EstimateRequest, shard: Any, pieces: Sequence[Any]) -> Stored[Any, ExperienceInfo]:
        self.requests.append(request)
        kept = [score for score, keep in zip(request.scores, request.keep, strict=True) if keep]
        tally = Tally()
        tally.add("objective/kl", sum(kept), len(kept))
        info = ExperienceInfo(
            prompt_lengths=tuple(int(score) for score in kept),
            response_lengths=(100,) * len(kept),
            valid_tokens=tuple(10 + int(score) for score in kept),
            kl=tuple(score / 10 for score in kept),
            advantages=moments(kept),
            token_rewards=moments([score + (0 if request.reward_moments is None else 1000) for score in kept]),
            tally=tally,
        )
        return Stored((self.rank, shard, tuple(pieces)), info)


def moments(values: Sequence[float]) -> Moments:
    return merged_moments(Moments(1, value, 0.0) for value in values)


def scored(sampled_shard: Callable[..., Shard], sizes: Sequence[int], dropped: Sequence[int] = ()) -> tuple[list[Shard], Judged]:
    rows = sum(sizes)
    shards = [sampled_shard([4] * size) for size in sizes]
    for number, shard in enumerate(shards):
        shard.asked["policy"] = [f"piece {number}"]  # type: ignore[list-item]
    scores = tuple(float(row) for row in range(rows))
    return shards, Judged(scores, tuple(row not in dropped for row in range(rows)), {"r": scores}, Tally())


def test_each_shard_goes_to_the_rank_that_sampled_it(local_group: Any, sampled_shard: Callable[..., Shard]) -> None:
    policy = local_group("policy", [Policy(0), Policy(1)])
    shards, judged = scored(sampled_shard, [2, 2, 1, 3])
    experience = estimate(policy, shards, judged, Coefficients(0.1, 0.5), whiten_rewards=False)
    assert [request.scores for request in policy.workers[0].requests] == [(0.0, 1.0), (2.0, 3.0)]
    assert [request.scores for request in policy.workers[1].requests] == [(4.0,), (5.0, 6.0, 7.0)]
    assert [handle.payload[0] for handle in experience.handles] == [0, 0, 1, 1]
    assert [handle.payload[2] for handle in experience.handles] == [(f"piece {n}",) for n in range(4)]
    request = policy.workers[1].requests[1]
    assert (request.kl_coef, request.baseline, request.reward_moments) == (0.1, 0.5, None)
    assert request.raw == {"r": (5.0, 6.0, 7.0)}


@pytest.mark.parametrize(("ranks", "runs"), [(2, [[0], [1, 2]]), (3, [[0], [1], [2]]), (4, [[], [0], [1], [2]])])
def test_a_number_of_shards_that_is_no_multiple_of_the_ranks_is_shared_out(
    ranks: int, runs: list[list[int]], local_group: Any, sampled_shard: Callable[..., Shard]
) -> None:
    """A rollout group of three cuts the step in three, whatever the policy has; some policy ranks then have no part in a call."""
    policy = local_group("policy", [Policy(rank) for rank in range(ranks)])
    shards, judged = scored(sampled_shard, [1, 1, 1])
    experience = estimate(policy, shards, judged, Coefficients(0.1, 0.0), whiten_rewards=True)
    assert [
        [request.scores[0] for request in worker.requests[: len(run)]] for worker, run in zip(policy.workers, runs, strict=True)
    ] == runs
    assert all(len(worker.requests) == 2 * len(run) for worker, run in zip(policy.workers, runs, strict=True)), "a pass, and one more"
    owners = [rank for rank, run in enumerate(runs) for _ in run]
    assert [handle.payload[0] for handle in experience.handles] == owners
    assert experience.valid_tokens == (10, 11, 12)


def test_rows_come_back_in_order_without_those_dropped(local_group: Any, sampled_shard: Callable[..., Shard]) -> None:
    policy = local_group("policy", [Policy(0), Policy(1)])
    shards, judged = scored(sampled_shard, [2, 2, 2, 2], dropped=(2, 3, 7))  # a whole shard, and half of one
    experience = estimate(policy, shards, judged, Coefficients(0.1, 0.0), whiten_rewards=False)
    kept = [0, 1, 4, 5, 6]
    assert experience.lengths == tuple(100 + row for row in kept)
    assert experience.valid_tokens == tuple(10 + row for row in kept)
    assert experience.kl == tuple(row / 10 for row in kept)
    assert experience.advantages == moments([float(row) for row in kept])
    assert experience.tally.means() == {"objective/kl": sum(kept) / 5}


def test_whitened_rewards_take_a_second_pass_with_the_moments_of_all_shards(local_group: Any, sampled_shard: Callable[..., Shard]) -> None:
    policy = local_group("policy", [Policy(0)])
    shards, judged = scored(sampled_shard, [3, 2])
    experience = estimate(policy, shards, judged, Coefficients(0.1, 0.0), whiten_rewards=True)
    first, second = policy.workers[0].requests[:2], policy.workers[0].requests[2:]
    assert [request.reward_moments for request in first] == [None, None]
    assert [request.reward_moments for request in second] == [moments([0.0, 1.0, 2.0, 3.0, 4.0])] * 2
    assert [request.scores for request in second] == [request.scores for request in first]
    assert len(experience.handles) == 2
