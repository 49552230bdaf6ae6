"""Short runs under Ray that lose processes of every kind end with the weights of undisturbed ones.

`benchmarks/chaos.py` has many more deaths; here is one of each way back: a group that is rebuilt while the run goes on, a policy rank that
dies between minibatches (rolled back), the coordinator, and a rollout group whose samples were a step ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LIMIT_S = 400.0
Death = tuple[int, str, int, str, float]


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import chaos as module
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def lived(chaos: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """`lived(steps, deaths, stale)`: the verdict on an undisturbed run and one with these deaths, and what became of each death."""

    def live(steps: int, deaths: Sequence[Death], *, stale: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        root = tmp_path_factory.mktemp("chaos")
        models = chaos.save_models(root, chaos.SHAPE)
        for name, plan in (("calm", ()), ("wild", deaths)):
            kills = [chaos.Kill(number, *death) for number, death in enumerate(plan)]
            chaos.write_run(root / name, models, steps, kills, stale=stale)
            chaos.drive(root / name, LIMIT_S)
        return chaos.verdict(root / "calm" / "run", root / "wild" / "run", steps), chaos.deaths(chaos.Log(root / "wild").read())

    return live


def assert_equal(verdict: dict[str, Any]) -> None:
    assert verdict == {"weights_equal": {"policy": True, "value": True}, "samples_equal": True, "each_sample_once": True}


def test_a_frozen_group_is_rebuilt_a_training_rank_rolls_back_a_coordinator_is_started_again(lived: Any) -> None:
    """Deaths in three steps; the reference's while the policy samples, so that nothing it owed is there yet."""
    plan = [
        (1, "reference.score", 0, "reference 0", -1.0),
        (2, "policy.update", 2, "policy 1", 0.0),
        (3, "policy.estimate", 0, "coordinator", -1.0),
    ]
    verdict, deaths = lived(5, plan, stale=False)
    assert_equal(verdict)
    hows = {death["victim"]: death["how"] for death in deaths}
    assert list(hows) == ["reference 0", "policy 1", "coordinator"]
    assert hows["reference 0"].startswith("rebuilt reference;") and "back to" not in hows["reference 0"]
    assert hows["policy 1"].startswith("rebuilt policy, value, back to "), "step 2, if its checkpoint was committed by then"
    assert hows["coordinator"].startswith("started again after step 2")


def test_a_rollout_group_a_step_ahead_dies_twice(lived: Any) -> None:
    """Once while it samples, once when samples of a policy that is no more are with it: the run goes back to where those were saved."""
    plan = [(1, "rollout.generate", 0, "rollout 0", 0.0), (3, "policy.update", 1, "rollout 0", -1.0)]
    verdict, deaths = lived(5, plan, stale=True)
    assert_equal(verdict)
    assert [death["victim"] for death in deaths] == ["rollout 0", "rollout 0"]
