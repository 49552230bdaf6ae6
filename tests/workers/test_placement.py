"""What a run asks of a cluster, and each way in which the cluster can never give it, in words that say what to change."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.workers.placement import Demand, Node, check_placement, demands

BIG, SMALL = Node(8, 4), Node(2, 1)


def demand(role: str = "policy", ranks: int = 1, cpus: float = 1, gpus: float = 0, strategy: str = "PACK", **more: Any) -> Demand:
    return Demand(role, ranks, cpus, gpus, strategy, **more)


def test_a_run_asks_for_what_its_sections_say(configured) -> None:
    config = configured(
        {
            "policy.ranks": 2, "policy.gpus_per_rank": 1, "policy.cpus_per_rank": 3, "value.ranks": 2, "reward.gpus_per_rank": 0.5,
            "placement.strategy": "SPREAD",
        }
    )  # fmt: skip
    assert demands(config) == [
        Demand("policy", 2, 3.0, 1.0, "SPREAD"),
        Demand("reference", 1, 1.0, 0.0, "SPREAD"),
        Demand("value", 2, 1.0, 0.0, "SPREAD"),
        Demand("reward", 1, 1.0, 0.5, "SPREAD"),
    ]


def test_a_run_asks_for_nothing_for_roles_it_does_not_start(configured) -> None:
    config = configured({"algorithm.estimator": "rloo", "policy.lora": {"r": 2}})
    assert [each.role for each in demands(config)] == ["policy", "reward"]


def test_a_rollout_group_is_placed_last_alone_and_in_its_own_interpreter(configured) -> None:
    changes = {"rollout.ranks": 2, "rollout.gpus_per_rank": 0.5, "rollout.cpus_per_rank": 3, "rollout.python": "/v/python"}
    wanted = demands(configured(changes | {"placement.launcher": "ray", "algorithm.estimator": "rloo", "policy.lora": {"r": 2}}))
    assert [each.role for each in wanted] == ["policy", "reward", "rollout"] and not wanted[0].alone
    assert wanted[-1] == Demand("rollout", 2, 3.0, 0.5, "PACK", alone=True, python="/v/python")


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        ([demand(ranks=8)], [BIG]),
        ([demand(ranks=4, gpus=1), demand("value", ranks=4)], [BIG]),
        ([demand(ranks=2), demand("value", ranks=2)], [SMALL, SMALL]),
        ([demand(ranks=2, strategy="STRICT_SPREAD")], [SMALL, BIG]),
        ([demand(ranks=8, strategy="STRICT_PACK")], [SMALL, BIG]),
        ([demand(gpus=2)], [SMALL, BIG]),
        ([demand(ranks=10, cpus=0.1, gpus=0.1, alone=True)], [Node(1, 1)]),
        ([demand(role, gpus=0.25) for role in ("policy", "reference", "value", "reward")], [Node(4, 1)]),
        ([demand(cpus=0.5), demand("value", cpus=0.5)], [Node(1, 0)]),
    ],
)
def test_what_fits_is_let_through(wanted, nodes) -> None:
    assert check_placement(wanted, nodes) is None


@pytest.mark.parametrize(
    ("wanted", "nodes", "what", "fix"),
    [
        ([demand(ranks=2), demand("value")], [SMALL], r"asks for 3 CPUs \(policy 2 × 1, value 1 × 1\), the cluster has 2", "--num-cpus=3"),
        ([demand(ranks=2, gpus=1)], [SMALL], r"asks for 2 GPUs \(policy 2 × 1\), the cluster has 1", r"gpus_per_rank.*--num-gpus=2"),
        ([demand(gpus=0.5)], [Node(8, 0)], "the cluster has 0", "gpus_per_rank"),
        ([demand()], [], "the cluster has 0", "ranks"),
        ([demand(cpus=4)], [SMALL] * 4, "a rank of policy needs 4 CPUs and 0 GPUs, more than any node has", r"policy\.cpus_per_rank"),
        ([demand(gpus=2)], [SMALL] * 4, "a rank of policy needs 1 CPUs and 2 GPUs", r"policy\.gpus_per_rank"),
        ([demand(ranks=3, strategy="STRICT_PACK")], [SMALL] * 3, "no single node holds all 3 ranks of policy", "PACK"),
        ([demand(ranks=3, strategy="STRICT_SPREAD")], [BIG] * 2, "3 ranks of policy need as many nodes, there are 2", "SPREAD"),
        ([demand(ranks=2, gpus=1, strategy="STRICT_SPREAD")], [BIG, Node(8, 0)], "there are 1", "SPREAD"),
        ([demand(ranks=3, cpus=1.5)], [SMALL, SMALL, Node(0.5, 0)], "only 2 of 3 ranks of policy fit", r"policy\.ranks"),
        ([demand(ranks=2, gpus=0.5)], [Node(8, 2)], "2 ranks of one group may land on one GPU", "whole GPUs"),
        ([demand(gpus=1.5)], [BIG], r"a rank cannot have 1\.5 GPUs", "whole number"),
        (
            [demand(ranks=3, gpus=0.6, alone=True)],
            [Node(8, 2)],
            r"more than half a GPU need 3 GPUs \(policy 3 × 0\.6\), the cluster has 2",
            r"0\.5 or less",
        ),
        ([demand(role, gpus=0.6) for role in ("policy", "value")], [Node(8, 1.5)], "need 2 GPUs", "share a GPU"),
        ([demand(ranks=5, gpus=0.4, alone=True)], [Node(8, 2)], "only 4 of 5 ranks", r"policy\.ranks"),
    ],
)
def test_what_can_never_be_placed_is_refused_with_the_way_out(wanted, nodes, what, fix) -> None:
    with pytest.raises(UserError, match=what) as caught:
        check_placement(wanted, nodes)
    assert re.search(fix, caught.value.fix), caught.value.fix
    assert caught.value.where


@given(
    ranks=st.integers(1, 6),
    cpus=st.sampled_from([0.5, 1, 2]),
    gpus=st.sampled_from([0, 0.25, 0.3, 0.5, 0.7, 1, 2]),
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=3),
)
def test_one_group_is_let_through_exactly_if_its_ranks_can_be_put_one_by_one(ranks, cpus, gpus, sizes) -> None:
    """Against putting each rank where there is room, GPU by GPU."""
    free = [[float(c), [1.0] * g] for c, g in sizes]

    def place() -> bool:
        for node in free:
            devices = node[1]
            room = [i for i, left in enumerate(devices) if left >= (gpus if gpus < 1 else 1) - 1e-9]
            needed = 0 if not gpus else 1 if gpus < 1 else int(gpus)
            if node[0] >= cpus and len(room) >= needed:
                node[0] -= cpus
                for i in room[:needed]:
                    devices[i] -= gpus if gpus < 1 else 1
                return True
        return False

    fits = all([place() for _ in range(ranks)]) and not (0 < gpus < 1 and ranks > 1)  # NCCL takes no two ranks of a group on one GPU
    try:
        check_placement([demand(ranks=ranks, cpus=cpus, gpus=gpus)], [Node(*size) for size in sizes])
        assert fits
    except UserError:
        assert not fits
