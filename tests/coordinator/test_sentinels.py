"""Detectors on made-up runs: silent on noise, soon on a change, once an episode, the same after a resume; counts of skipped steps."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.config.sentinels import SentinelsSection
from rlhf_dist.contracts.roles import NOT_WRITTEN
from rlhf_dist.coordinator.sentinels import DETECTORS, Sentinels, median
from rlhf_dist.coordinator.update import UpdateReport

USUAL = {"objective/kl": 4.0, "objective/scores": 0.5, "policy/entropy_avg": 2.0, "val/response_length": 60.0}
PLANTED = [
    ("objective/kl", 16.0, "KL explosion", "above"),
    ("objective/scores", -0.4, "reward collapse", "below"),
    ("policy/entropy_avg", 0.2, "entropy collapse", "below"),
    ("val/response_length", 150.0, "length drift", "above"),
    ("val/response_length", 20.0, "length drift", "below"),
]


def noisy(seed: int, steps: int, memory: float, share: float, level: dict[str, float] | None = None) -> Iterator[dict[str, float]]:
    """Stationary runs: AR(1) noise of a standard deviation that is a share of the level (of scores: at least that share of 1)."""
    draw, state = random.Random(seed), dict.fromkeys(USUAL, 0.0)
    for _ in range(steps):
        metrics = {}
        for name, usual in (USUAL | (level or {})).items():
            state[name] = memory * state[name] + math.sqrt(1 - memory**2) * draw.gauss(0, 1)
            metrics[name] = usual + share * (max(abs(usual), 1.0) if name == "objective/scores" else usual) * state[name]
        yield metrics


def steady(steps: int) -> list[dict[str, float]]:
    return list(noisy(0, steps, 0.0, 0.1))


def test_on_stationary_noise_fewer_than_one_run_in_a_hundred_is_warned_of() -> None:
    warned = 0
    for seed in range(1000):
        draw = random.Random(-seed)
        level = {"objective/kl": draw.choice([0.5, 5.0, 15.0]), "objective/scores": draw.choice([0.0, 0.5, -2.0, 30.0])}
        memory, share = draw.choice([(0.0, 0.05), (0.0, 0.2), (0.5, 0.1), (0.5, 0.2), (0.8, 0.1)])
        sentinels = Sentinels(SentinelsSection())
        warned += any([sentinels.watch(metrics) for metrics in noisy(seed, 120, memory, share, level)])
    assert warned < 10


@pytest.mark.parametrize(("metric", "value", "name", "side"), PLANTED)
def test_a_planted_change_is_warned_of_within_patience_once_and_again_when_it_comes_again(
    metric: str, value: float, name: str, side: str
) -> None:
    sentinels, said = Sentinels(SentinelsSection()), []
    for step, metrics in enumerate(steady(120)):
        wrong = 40 <= step < 48 or 90 <= step < 98
        said += [(step, warning) for warning in sentinels.watch(metrics | ({metric: value} if wrong else {}))]
    assert [step for step, _ in said] == [42, 92], "in the third step, and not while it lasts"
    text = said[0][1]
    assert text.startswith(f"warning: {name}: {metric} was {value:.4g}, {value:.4g}, {value:.4g} in the last 3 steps, {side} ")
    assert "Likely causes: " in text and sentinels.metrics()["sentinels/warnings"] == 2.0


@pytest.mark.parametrize("metric", USUAL)
def test_fewer_wild_steps_than_patience_are_no_warning(metric: str) -> None:
    sentinels, wild = Sentinels(SentinelsSection()), {name: value for name, value, *_ in PLANTED}[metric]
    for step, metrics in enumerate(steady(60)):
        assert sentinels.watch(metrics | ({metric: wild} if step % 5 in (0, 1) and step > 20 else {})) == []


def test_a_kl_that_explodes_at_once_is_seen_before_there_is_a_window() -> None:
    sentinels = Sentinels(SentinelsSection())
    seen = [sentinels.watch({"objective/kl": kl}) for kl in (0.0, 9.0, 31.0, 90.0, 200.0, 250.0)]
    assert [len(warnings) for warnings in seen] == [0, 0, 0, 0, 1, 0] and "3 × sentinels.kl_limit" in seen[4][0]
    calm = Sentinels(SentinelsSection())
    assert not any(calm.watch({"objective/kl": 0.3 * step}) for step in range(100)), "it may grow all the time"


def test_a_small_drop_of_a_reward_that_hardly_moves_is_no_collapse() -> None:
    sentinels = Sentinels(SentinelsSection())
    assert not any(sentinels.watch({"objective/scores": 1.0 if step < 30 else 0.99}) for step in range(60))
    assert Sentinels(SentinelsSection(reward_share=0.005)).watch({}) == []


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 80), wild=st.sampled_from(PLANTED))
def test_a_resumed_run_warns_as_an_undisturbed_one(seed: int, cut: int, wild: tuple[str, float, str, str]) -> None:
    run = [m | ({wild[0]: wild[1]} if 30 <= step < 45 else {}) for step, m in enumerate(noisy(seed, 80, 0.5, 0.2))]
    through, first = Sentinels(SentinelsSection()), Sentinels(SentinelsSection())
    want = [through.watch(metrics) for metrics in run]
    said = [first.watch(metrics) for metrics in run[:cut]]
    second = Sentinels(SentinelsSection(), json.loads(json.dumps(first.state_dict())))
    assert said + [second.watch(metrics) for metrics in run[cut:]] == want
    assert second.state_dict() == through.state_dict()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["", "loss", "gradient"]), min_size=1, max_size=4), max_size=12), st.integers(1, 4))
def test_a_run_is_spent_exactly_when_so_many_in_a_row_were_skipped(updates: list[list[str]], most: int) -> None:
    sentinels, row = Sentinels(SentinelsSection(max_skipped=most)), 0
    for step, faults in enumerate(updates, start=1):
        longest = 0
        for fault in faults:
            row = row + 1 if fault else 0
            longest = max(longest, row)
        said = sentinels.note(step, UpdateReport(faults={"policy": list(faults)}))  # type: ignore[arg-type]
        assert len(said) == any(faults) and sentinels.metrics()["sentinels/skipped_steps"] == sum(map(bool, faults))
        error = sentinels.spent(step)
        assert (error is not None) == (longest >= most)
        row = 0 if error else row
        assert sentinels.spent(step) is None, "it begins anew"


def test_the_row_of_each_model_is_its_own_and_survives_a_resume() -> None:
    sentinels = Sentinels(SentinelsSection(max_skipped=3))
    sentinels.note(1, UpdateReport(faults={"policy": ["loss", "loss"], "value": ["", ""]}))
    resumed = Sentinels(SentinelsSection(max_skipped=3), sentinels.state_dict())
    resumed.note(2, UpdateReport(faults={"policy": ["gradient", ""], "value": ["loss"]}, capsules=[("policy", "/run/capsules/one")]))
    error = resumed.spent(2)
    assert error is not None and error.what.startswith("3 optimizer steps of the policy in a row") and "gradient" in error.what
    assert "rlhf-dist replay /run/capsules/one" in error.fix and error.where == "step 2 (sentinels.max_skipped 3)"


def test_a_capsule_that_could_not_be_written_is_none_to_replay() -> None:
    sentinels = Sentinels(SentinelsSection(max_skipped=1))
    said = sentinels.note(1, UpdateReport(faults={"policy": ["loss"]}, capsules=[("policy", f"{NOT_WRITTEN} on rank 0: the disk is full")]))
    error = sentinels.spent(1)
    assert "the disk is full" in said[1] and error is not None and "replay" not in error.fix


def test_each_model_has_its_number_of_capsules() -> None:
    sentinels = Sentinels(SentinelsSection(capsules=2))
    assert sentinels.capsules_left() == {"policy": 2, "value": 2}
    sentinels.note(1, UpdateReport(faults={"policy": ["loss"]}, capsules=[("policy", "a"), ("policy", "b"), ("value", "c")]))
    assert Sentinels(SentinelsSection(capsules=2), sentinels.state_dict()).capsules_left() == {"policy": 0, "value": 1}


def test_every_warning_says_what_to_do() -> None:
    assert {detector.metric for detector in DETECTORS} == set(USUAL)
    assert all(": " in detector.causes for detector in DETECTORS)
    assert median([3.0, 1.0, 2.0]) == 2.0 and median([4.0, 1.0, 2.0, 3.0]) == 2.5
