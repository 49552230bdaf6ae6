from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.state import RunState

counts = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
mixers = st.dictionaries(
    st.text(), st.dictionaries(st.text(), st.one_of(floats, counts, st.none(), st.lists(floats, max_size=3)), max_size=3), max_size=3
)
states = st.builds(
    RunState,
    step=counts,
    policy_version=counts,
    prompt_cursor=counts,
    kl_coef=floats,
    baseline=floats,
    reward_mixer=mixers,
    best_score=st.none() | floats,
    best_step=st.none() | counts,
    dropped=st.dictionaries(st.text(), counts, max_size=3),
    optimizer_steps=counts,
    kl=st.none() | floats,
    held_out=mixers,
    yardstick=mixers,
    metrics_bytes=counts,
    seconds=st.dictionaries(st.text(), st.dictionaries(st.text(), floats, max_size=3), max_size=3),
    tokens=st.dictionaries(st.text(), counts, max_size=3),
    weights=counts,
    pending=st.dictionaries(st.integers(0, 10**17).map(str), counts, max_size=3),
)


def bits(value: Any) -> Any:
    """Floats as their bytes, so that -0.0 and 0.0 differ."""
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [bits(inner) for inner in value]
    return struct.pack("<d", value) if isinstance(value, float) else value


@given(states)
def test_round_trip_is_exact(state: RunState) -> None:
    restored = RunState.from_json(state.to_json())
    assert restored == state
    assert bits(restored.to_dict()) == bits(state.to_dict())


def test_the_state_travels_inside_another_json() -> None:
    state = RunState(step=3, kl_coef=0.1 + 0.2, reward_mixer={"joy": {"count": 7, "mean": 1 / 3, "m2": 1e-300}})
    assert RunState.from_dict(json.loads(json.dumps({"state": state.to_dict()}))["state"]) == state


@pytest.mark.parametrize(
    "broken",
    [
        RunState(kl_coef=float("nan")),
        RunState(baseline=float("inf")),
        RunState(reward_mixer={"a": (1, 2)}),
        RunState(reward_mixer={1: 2.0}),
        RunState(reward_mixer={"a": object()}),
    ],  # type: ignore[dict-item]
)
def test_what_would_not_come_back_equal_is_refused(broken: RunState) -> None:
    with pytest.raises(ValueError):
        broken.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"stepp": 1}, "stepp"),
        ({"step": "3"}, "step"),
        ({"step": 3.5}, "step"),
        ({"dropped": {"a": "b"}}, "dropped"),
    ],
)
def test_a_foreign_state_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunState.from_dict(RunState().to_dict() | change)


def test_a_missing_key_is_named() -> None:
    values = RunState().to_dict()
    del values["kl_coef"]
    with pytest.raises(UserError, match="lacks kl_coef"):
        RunState.from_dict(values)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_text_that_is_no_state(text: str) -> None:
    with pytest.raises(UserError, match="run state"):
        RunState.from_json(text)


def test_counters_and_the_best_evaluation() -> None:
    state = RunState()
    state.count_dropped("abstained", 2)
    state.count_dropped("abstained", 3)
    state.count_dropped("too long", 0)
    assert state.dropped == {"abstained": 5}
    assert [state.record_evaluation(score, step) for step, score in enumerate((-0.5, 0.7, 0.7, 0.6))] == [True, True, False, False]
    assert (state.best_score, state.best_step) == (0.7, 1)
