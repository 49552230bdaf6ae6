"""The look before training: two real prompts, dummy completions, every fault found."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rewards import FunctionReward
from rlhf_dist.rewards.guard import GuardedReward
from rlhf_dist.rewards.probe import PROBE_COMPLETIONS, probe
from rlhf_dist.rewards.sources import guarded


@pytest.fixture
def reward_of(tmp_path: Path) -> Iterator[Callable[..., GuardedReward]]:
    """`reward_of(code, **rules)`: the function `reward` of a file, as a run would ask it."""
    made: list[GuardedReward] = []

    def make(code: str, **rules: object) -> GuardedReward:
        (tmp_path / "my_reward.py").write_text(code)
        section = {"kind": "function", "name": "r", "path": f"{tmp_path / 'my_reward.py'}:reward", **rules}
        made.append(guarded(FunctionReward.model_validate(section)))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def test_probe_calls_the_reward_on_two_real_prompts(reward_of: Callable[..., GuardedReward], tmp_path: Path) -> None:
    code = "import json\ndef reward(**given):\n    json.dump(given, open('seen.json', 'w'))\n    return [0.0] * len(given['prompts'])"
    reward = reward_of(code.replace("seen.json", str(tmp_path / "seen.json")))
    probe(reward, ["one", "two", "three"], {"answer": [1, 2, 3]})
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == {"prompts": ["one", "two"], "completions": list(PROBE_COMPLETIONS), "answer": [1, 2]}


def test_probe_with_one_prompt_and_with_none(reward_of: Callable[..., GuardedReward]) -> None:
    reward = reward_of("def reward(prompts): return [0.0] * len(prompts)")
    assert probe(reward, ["one"], {}).values == (0.0,)
    with pytest.raises(ValueError):
        probe(reward, [], {})


@pytest.mark.parametrize(
    "body, message",
    [
        ("return [0.0]", "1 values for 2"),
        ("return ['good', 'bad']", "'good'"),
        ("return [0.0, float('nan')]", "nan for row 1"),
        ("raise OSError('down')", "OSError: down"),
    ],
)
def test_probe_finds_faults_before_training(reward_of: Callable[..., GuardedReward], body: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe(reward_of(f"def reward(completions):\n    {body}"), ["one", "two"], {})


def test_a_reward_that_may_fail_may_fail_on_a_probe_too(reward_of: Callable[..., GuardedReward]) -> None:
    reward = reward_of("def reward(completions): return [1 / 0]", on_failure="drop_group")
    assert probe(reward, ["one", "two"], {}).failed == (0, 1)
