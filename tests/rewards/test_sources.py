"""Each kind of source is made with its own settings."""

from pathlib import Path

from rlhf_dist.config.rewards import FunctionReward, HttpReward
from rlhf_dist.contracts.reward import RewardRequest
from rlhf_dist.rewards.sources import guarded


def test_a_function(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def reward(completions): return [2.0] * len(completions)")
    reward = guarded(FunctionReward(kind="function", name="f", path=f"{tmp_path / 'r.py'}:reward"))
    assert (reward.name, reward(RewardRequest(["p"], ["c"])).values) == ("f", (2.0,))
    reward.close()


def test_an_endpoint() -> None:
    reward = guarded(HttpReward(kind="http", name="h", url="http://127.0.0.1:9/", on_failure="default", default=1.5, retries=0))
    assert reward(RewardRequest(["p"], ["c"])).defaulted == (0,)
    reward.close()
