from __future__ import annotations

from rlhf_dist.evaluation.interval import MeanInterval
from rlhf_dist.evaluation.report_facts import correlation, headline, number, rows_of_sides, shown, signed
from rlhf_dist.evaluation.reward_report import JudgedPair, reward_report


def pairs(count: int, wrong: int, first: int = 0) -> list[JudgedPair]:
    return [JudgedPair(*((0.0, 1.0) if n < wrong else (1.0, 0.0)), 5, 5, "a", None, first + n) for n in range(count)]


def test_a_good_model_reads_as_good() -> None:
    facts = {fact.name: fact for fact in headline(reward_report(pairs(200, 20), pairs(200, 20, 1000)))}
    assert facts["Accuracy, held out"].value.startswith("0.900 [0.8")
    assert facts["Model − that rule"].tone == "good" and facts["Train − held out"].tone == "good"
    assert facts["Log-loss"].tone == "good"
    assert "not defined" in facts["Correlation of score and length"].value


def test_guessing_and_overfitting_read_as_bad() -> None:
    facts = {fact.name: fact for fact in headline(reward_report(pairs(100, 50), pairs(100, 2, 1000)))}
    assert facts["Model − that rule"].tone == "bad" and "do not trust" in facts["Model − that rule"].meaning
    assert facts["Train − held out"].tone == "bad" and "overfitting" in facts["Train − held out"].meaning
    assert facts["Log-loss"].tone == "bad"


def test_one_row_says_nothing_and_says_so() -> None:
    report = reward_report(pairs(1, 1), pairs(200, 20, 1000))
    facts = {fact.name: fact for fact in headline(report)}
    for name in ("Model − that rule", "Train − held out"):
        assert "too few rows to tell (1 prompt" in facts[name].meaning and facts[name].tone == "plain" and "[" not in facts[name].value
    assert facts["Log-loss"].tone == "plain"
    assert rows_of_sides(report)[0][1] == "1 comparison of 1 prompt"


def test_a_handful_of_rows_is_too_few_and_nothing_leaves_its_bounds() -> None:
    report = reward_report(pairs(4, 2), pairs(4, 0, 1000))
    facts = {fact.name: fact for fact in headline(report)}
    for name in ("Model − that rule", "Train − held out"):
        assert "too few rows to tell (4 prompts" in facts[name].meaning and facts[name].tone == "plain"
        assert "do not trust" not in facts[name].meaning and "no sign" not in facts[name].meaning
    assert report.held_out.log_loss.low is not None and report.held_out.log_loss.low >= 0
    assert facts["Log-loss"].tone == "plain"


def test_a_handful_that_is_clearly_right_or_wrong_is_told_as_such() -> None:
    right, wrong = (reward_report(pairs(25, count)) for count in (0, 25))
    assert [fact.tone for report in (right, wrong) for fact in headline(report) if fact.name == "Model − that rule"] == ["good", "bad"]
    three = next(fact for fact in headline(reward_report(pairs(3, 0))) if fact.name == "Model − that rule")
    assert three.tone == "plain", "three right ones prove nothing"


def test_counts_and_fates_stand_side_by_side() -> None:
    ties = [JudgedPair(1.0, 0.0, 1, 1, "a", None, 9000, 0.5)]
    report = reward_report([*pairs(1200, 3), *ties], pairs(10, 0, 5000), {"dropped: long": 31}, {"cut: short": 2})
    assert rows_of_sides(report) == [
        ("held out", "1,201 comparisons of 1,201 prompts, 1 tie, in no accuracy", {"dropped: long": 31}),
        ("train", "10 comparisons of 10 prompts", {"cut: short": 2}),
    ]


def test_numbers_as_people_read_them() -> None:
    assert shown(MeanInterval(0.71234, 0.69, 0.733, 5, 5)) == "0.712 [0.690, 0.733]"
    assert shown(MeanInterval(0.5, None, None, 1, 1)) == "0.500"
    assert signed(-0.1, -0.2, 0.0) == "−0.100 [−0.200, +0.000]"
    assert signed(0.1, None, None) == "+0.100"
    assert (correlation(None), correlation(-0.456), number(None), number(1.23456)) == ("not defined", "−0.46", "not defined", "1.235")
