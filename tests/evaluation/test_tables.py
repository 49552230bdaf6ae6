from __future__ import annotations

import dataclasses
import re

import pytest
from rich.console import Console
from rich.table import Table

from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.evaluation.before_after import Comparison, Example, Pair
from rlhf_dist.evaluation.held_out import HeldOutSamples, summarise
from rlhf_dist.evaluation.interval import MeanInterval
from rlhf_dist.evaluation.tables import headline_table, samples_table


def rendered(table: Table) -> str:
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    return text


def cells(text: str) -> list[str]:
    """The columns of a rendered table, each with its lines joined: wrapping undone."""
    rows = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if re.search("[│┃]", line)]
    return [" ".join(" ".join(row[i] for row in rows).split()) for i in range(len(rows[0]))]


def evaluation(shift: float, **changes: object) -> HeldOutSamples:
    samples = HeldOutSamples(
        prompt_ids=[1, 1, 2, 2],
        scores=[0.1 + shift, 0.2 + shift, 0.3 + shift, 0.4 + shift],
        rewards={"joy": [0.5 + shift] * 4},
        lengths=[100, 200, 1000, 3000],
        stop_reasons=[StopReason.STOP_TOKEN] * 4,
        kl=[0.0 + shift] * 4,
    )
    return dataclasses.replace(samples, **changes)  # type: ignore[arg-type]


def comparison(before: HeldOutSamples, after: HeldOutSamples, unpaired: int = 0) -> Comparison:
    change = MeanInterval(0.25, 0.125, 0.375, 4, 2)
    return Comparison(
        summarise(before), summarise(after), {"score": change, "length": MeanInterval(-1234.5, None, None, 4, 1)}, (), unpaired
    )


def row(text: str, label: str) -> list[str]:
    return next([cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if label in line)


def test_the_headline_has_every_quantity_with_its_interval() -> None:
    text = rendered(headline_table(comparison(evaluation(0.0), evaluation(0.25))))
    assert row(text, "score") == ["score", "0.250 [-1.021, 1.521]", "0.500 [-0.771, 1.771]", "+0.250 [+0.125, +0.375]"]
    assert row(text, "rewards/joy")[1:] == ["0.500 [0.500, 0.500]", "0.750 [0.750, 0.750]", "not measured"]
    assert row(text, "length")[1] == "1075 [-10678, 12828]" and row(text, "length")[3] == "-1234 (one prompt)"
    assert row(text, "stop rate") and row(text, "KL")
    assert "4 samples of 2 prompts" in text
    assert "one evaluation only" not in text


def test_the_headline_says_what_is_missing() -> None:
    before = evaluation(0.0, kl=None, scores=[0.1, None, 0.3, 0.4])
    text = rendered(headline_table(comparison(before, evaluation(0.25), unpaired=3)))
    assert row(text, "KL")[1] == "not measured"
    assert "3 samples stand in one evaluation only" in text
    assert "before: 1 samples without score" in text


def example(**changes: object) -> Example:
    pair = Pair(1, 0, "Once upon a time there was a cat.", "It was sad and it cried.", "It was happy and it danced.", 0.12, 0.98)
    return Example("largest gain", dataclasses.replace(pair, **changes))  # type: ignore[arg-type]


def test_samples_can_be_read_in_100_columns() -> None:
    before = "The dog ran. " * 20
    reason, prompt, left, right = cells(rendered(samples_table([example(before=before)])))
    assert reason == "score largest gain 0.120 → 0.980 +0.860"
    assert prompt == "prompt Once upon a time there was a cat."
    assert left == "before " + before.strip()
    assert right == "after It was happy and it danced."


def test_a_cut_is_announced() -> None:
    after = cells(rendered(samples_table([example(after="x " * 100)], max_characters=20)))[3]
    assert after == "after " + "x " * 10 + "… (+180 characters)"


@pytest.mark.parametrize(
    ("written", "shown"),
    [("[bold]not markup[/bold]", "[bold]not markup[/bold]"), ("\x1b[2Jgone\x07", "\\x1b[2Jgone\\x07"), (":smile:", ":smile:")],
)
def test_a_completion_is_shown_and_never_obeyed(written: str, shown: str) -> None:
    text = rendered(samples_table([example(after=written)]))
    assert "\x1b" not in text and "\x07" not in text
    assert cells(text)[3] == f"after {shown}"


def test_a_sample_without_score_says_so() -> None:
    assert cells(rendered(samples_table([example(score_before=None)])))[0] == "score largest gain no score → 0.980"


def test_a_word_longer_than_a_column_is_folded_not_lost() -> None:
    word = "abcdefghij" * 9
    assert cells(rendered(samples_table([example(after=word)])))[3].replace(" ", "") == "after" + word


def test_no_examples_give_an_empty_table() -> None:
    assert "prompt" in rendered(samples_table([]))
