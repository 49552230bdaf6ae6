"""The report on pairs made by hand, and its properties."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.evaluation.reward_report import JudgedPair, SideRows, reward_report

HAND = [
    JudgedPair(2.0, 0.0, 10, 4, "a", 0.5, 0),  # right, better is longer
    JudgedPair(1.0, 0.0, 3, 7, "a", 1.0, 1),  # right, better is shorter
    JudgedPair(0.0, 1.0, 8, 2, "b", 2.0, 2),  # wrong, longer
    JudgedPair(0.5, 0.5, 5, 5, "b", 4.0, 3),  # undecided, same length
    JudgedPair(3.0, 1.0, 9, 6, "a", None, 4),  # right, longer
    JudgedPair(9.0, 0.0, 50, 1, "b", 8.0, 5, 0.5),  # a tie
]

scores = st.floats(-5, 5).map(lambda value: round(value, 2))
pair = st.builds(
    JudgedPair,
    better=scores,
    worse=scores,
    better_tokens=st.integers(1, 50),
    worse_tokens=st.integers(1, 50),
    source=st.sampled_from(["a", "b"]),
    margin=st.none() | st.floats(0, 5),
    prompt=st.integers(0, 8),
    probability=st.none() | st.sampled_from([0.5, 0.75, 1.0]),
)
decided = pair.filter(lambda each: each.probability != 0.5)


def test_accuracy_and_rules_by_hand() -> None:
    report = reward_report(HAND)
    assert report.held_out.accuracy.mean == pytest.approx(3.5 / 5)
    assert (report.held_out.pairs, report.held_out.ties, report.held_out.equal_scores, report.held_out.prompts) == (6, 1, 1, 6)
    assert {name: rule.mean for name, rule in report.baselines.items()} == pytest.approx(
        {"longer answer wins": 3.5 / 5, "shorter answer wins": 1.5 / 5, "random": 0.5}
    )
    assert report.best_baseline == "longer answer wins"
    assert report.over_baseline.mean == pytest.approx(0)
    assert (report.train, report.gap) == (None, None)


def test_buckets_by_hand() -> None:
    report = reward_report(HAND)
    assert [(b.label, b.accuracy.mean, b.accuracy.n) for b in report.by_source] == [("a", 1.0, 3), ("b", 0.25, 2)]
    assert [(b.label, b.accuracy.mean) for b in report.by_margin] == [("0.5", 1.0), ("1", 1.0), ("2", 0.0), ("4", 0.5)]
    assert report.without_margin == 1
    assert [(b.label, b.accuracy.mean, b.accuracy.n) for b in report.by_length_difference] == [
        ("1 to 5 shorter", 1.0, 1), ("same length", 0.5, 1), ("1 to 5 longer", 1.0, 1), ("6 or more longer", 0.5, 2),
    ]  # fmt: skip
    assert sum(b.accuracy.n for b in report.by_length) == 5
    assert [b.label for b in report.by_length] == ["5 to 7", "8", "9", "10"]


def test_loss_and_scores_by_hand() -> None:
    report = reward_report(HAND)
    losses = [math.log1p(math.exp(-difference)) for difference in (2, 1, -1, 0, 2)]
    tie = (math.log1p(math.exp(-9)) + math.log1p(math.exp(9))) / 2
    assert report.held_out.log_loss.mean == pytest.approx((sum(losses) + tie) / 6)
    assert report.scores.answers == 11  # the two equal answers of the fourth prompt are one
    assert report.scores.mean_difference == pytest.approx((2 + 1 - 1 + 0 + 2) / 5)
    assert sum(report.scores.better) == sum(report.scores.worse) == 5


def test_correlation_with_length_is_that_of_the_textbook() -> None:
    report = reward_report(HAND)
    tokens = [10, 4, 3, 7, 8, 2, 5, 9, 6, 50, 1]
    values = [2.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5, 3.0, 1.0, 9.0, 0.0]
    assert report.lengths.pearson == pytest.approx(scipy.stats.pearsonr(tokens, values).statistic)
    assert report.lengths.spearman == pytest.approx(scipy.stats.spearmanr(tokens, values).statistic)
    assert sorted(report.lengths.points) == sorted(zip(tokens, values, strict=True))
    proportional = [JudgedPair(2.0 * n + 2, 2.0 * n, n + 1, n, "a", None, n) for n in range(1, 9)]
    assert reward_report(proportional).lengths.pearson == pytest.approx(1)
    assert reward_report([JudgedPair(1.0, 0.0, 5, 5, "a", None, 0)]).lengths.pearson is None


def test_a_prompt_weighs_the_same_however_many_pairs_its_ranking_gives() -> None:
    ranking = [JudgedPair(a, b, 1, 1, "a", None, 0) for a, b in ((3.0, 2.0), (3.0, 1.0), (2.0, 1.0))]
    report = reward_report([*ranking, JudgedPair(0.0, 1.0, 1, 1, "a", None, 1)])
    assert report.held_out.accuracy.mean == 0.5
    assert (report.held_out.accuracy.n, report.held_out.accuracy.clusters) == (4, 2)
    assert report.scores.answers == 5


def drawn(count: int, right: float, offset: int = 0) -> list[JudgedPair]:
    pick = random.Random(offset)
    return [JudgedPair(*((1.0, 0.0) if pick.random() < right else (0.0, 1.0)), 3, 2, "a", None, offset + number) for number in range(count)]


def test_a_model_that_remembers_is_flagged() -> None:
    remembers = reward_report(drawn(300, 0.6), drawn(300, 0.95, 10_000))
    assert remembers.gap is not None and remembers.gap.overfitting
    assert remembers.gap.mean == pytest.approx(0.35, abs=0.08)
    fair = reward_report(drawn(300, 0.7), drawn(300, 0.7, 10_000))
    assert fair.gap is not None and not fair.gap.overfitting
    assert fair.gap.low is not None and fair.gap.high is not None and fair.gap.low < 0 < fair.gap.high
    backwards = reward_report(drawn(300, 0.95), drawn(300, 0.6, 10_000))
    assert backwards.gap is not None and not backwards.gap.overfitting


def test_a_model_that_counts_tokens_is_no_better_than_the_rule() -> None:
    pick = random.Random(0)
    lengths = [(pick.randint(5, 60), pick.randint(5, 60)) for _ in range(300)]
    report = reward_report([JudgedPair(float(a), float(b), a, b, "a", None, n) for n, (a, b) in enumerate(lengths)])
    rule = report.baselines[report.best_baseline]
    if report.best_baseline == "longer answer wins":
        assert (rule.mean, report.over_baseline.mean) == (report.held_out.accuracy.mean, 0)
    assert [b.accuracy.mean for b in report.by_length_difference if "shorter" in b.label] == [0, 0]
    assert [b.accuracy.mean for b in report.by_length_difference if "longer" in b.label] == [1, 1]
    assert report.lengths.spearman == pytest.approx(1)


@given(st.lists(decided, min_size=1, max_size=30))
def test_swapping_better_and_worse_gives_one_minus_the_accuracy(pairs: list[JudgedPair]) -> None:
    turned = [replace(p, better=p.worse, worse=p.better, better_tokens=p.worse_tokens, worse_tokens=p.better_tokens) for p in pairs]
    report, mirror = reward_report(pairs), reward_report(turned)
    assert mirror.held_out.accuracy.mean == pytest.approx(1 - report.held_out.accuracy.mean)
    assert mirror.baselines["longer answer wins"].mean == pytest.approx(1 - report.baselines["longer answer wins"].mean)
    assert (mirror.scores.better, mirror.scores.worse) == (report.scores.worse, report.scores.better)
    assert mirror.lengths == report.lengths
    if report.held_out.accuracy.low is not None:
        assert mirror.held_out.accuracy.high == pytest.approx(1 - report.held_out.accuracy.low)


@given(st.lists(decided, min_size=1, max_size=30))
def test_a_label_told_the_other_way_round_changes_nothing(pairs: list[JudgedPair]) -> None:
    told = [replace(p, probability=1.0) if p.probability is None else p for p in pairs]
    assert reward_report([p.swapped() for p in told]).to_dict() == reward_report(pairs).to_dict()


@given(st.lists(decided, min_size=1, max_size=20), st.lists(pair.filter(lambda p: p.probability == 0.5), max_size=5))
def test_ties_are_counted_and_in_no_accuracy(pairs: list[JudgedPair], ties: list[JudgedPair]) -> None:
    alone, beside = reward_report(pairs), reward_report([*ties, *pairs])
    assert beside.held_out.ties == len(ties)
    assert beside.held_out.accuracy == alone.held_out.accuracy
    assert (beside.baselines, beside.by_length, beside.by_source) == (alone.baselines, alone.by_length, alone.by_source)


@given(st.lists(decided, min_size=1, max_size=30), st.randoms())
def test_every_bucket_partition_adds_up_and_the_json_is_valid(pairs: list[JudgedPair], shuffle: random.Random) -> None:
    report = reward_report(pairs, pairs[:3], {"dropped: x": 3})
    for buckets in (report.by_source, report.by_length, report.by_length_difference):
        assert sum(b.accuracy.n for b in buckets) == len(pairs)
    assert sum(b.accuracy.n for b in report.by_margin) + report.without_margin == len(pairs)
    figures = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert figures["held_out"]["fates"] == {"dropped: x": 3}
    assert figures["held_out"]["accuracy"]["mean"] == report.held_out.accuracy.mean
    by_prompt = sorted(pairs, key=lambda p: p.prompt)
    prompts = sorted({p.prompt for p in pairs}, key=lambda _: shuffle.random())
    shuffled = [p for prompt in prompts for p in by_prompt if p.prompt == prompt]
    assert reward_report(shuffled).held_out.accuracy.mean == pytest.approx(report.held_out.accuracy.mean)


@given(st.lists(decided, min_size=1, max_size=12))
def test_a_difference_of_two_shares_lies_within_1(pairs: list[JudgedPair]) -> None:
    over = reward_report(pairs).over_baseline
    assert over.low is None or (over.high is not None and -1 - 1e-12 <= over.low <= over.mean <= over.high <= 1 + 1e-12)


def test_over_random_guessing_the_interval_is_that_of_the_accuracy() -> None:
    same_length = [JudgedPair(1.0, 0.0, 5, 5, "a", None, n) for n in range(10)]
    report = reward_report(same_length)
    assert report.best_baseline == "random" and report.over_baseline.mean == 0.5
    assert report.held_out.accuracy.low is not None and report.over_baseline.low == pytest.approx(report.held_out.accuracy.low - 0.5)


def test_a_train_side_of_ties_alone_keeps_its_counts() -> None:
    ties = [replace(HAND[0], probability=0.5, prompt=n) for n in range(3)]
    report = reward_report(HAND, ties, {}, {"dropped: x": 2})
    assert report.train == SideRows(3, 3, 0, 3, {"dropped: x": 2}) and report.gap is None
    assert reward_report(HAND, [], {}, {"dropped: x": 2}).train == SideRows(0, 0, 0, 0, {"dropped: x": 2})
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["train"]["ties"] == 3


def test_held_out_rows_that_were_all_dropped_are_named_by_their_fate() -> None:
    with pytest.raises(UserError, match="all held-out rows were dropped: 3 longer than"):
        reward_report([], [], {"dropped: longer than data.max_tokens": 3})


def test_at_most_two_thousand_points_are_kept() -> None:
    report = reward_report([JudgedPair(float(n), -float(n), n, n + 1, "a", None, n) for n in range(1, 1501)])
    assert len(report.lengths.points) == 2000 and report.scores.answers == 3000


def test_nothing_to_judge_and_nan_are_errors() -> None:
    for pairs in ([], [HAND[-1]]):
        with pytest.raises(UserError, match="no held-out comparison"):
            reward_report(pairs)
    with pytest.raises(ValueError, match="1 of 12 scores are not finite"):
        reward_report([*HAND[:-1], replace(HAND[-1], better=math.nan)])
    with pytest.raises(ValueError, match="2 of 2 scores"):
        reward_report(HAND, [replace(HAND[0], better=math.inf, worse=math.nan)])
