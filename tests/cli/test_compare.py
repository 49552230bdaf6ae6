"""`rlhf-dist compare` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.data.files import iter_rows
from rlhf_dist.data.layouts import detect
from rlhf_dist.rewards.scorer import RewardModel, preference


def run(tiny_scorer: Path, folder: Path, rows: list[dict[str, Any]], *settings: str) -> list[dict[str, Any]]:
    data, out = folder / "rows.jsonl", folder / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    main(["compare", "--model", str(tiny_scorer), "--data", str(data), "--output", str(out), "model.device=cpu", *settings])
    return [row for _, row in iter_rows(str(out))]


def test_two_answers(tiny_scorer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "--model", str(tiny_scorer), "--prompt", "w1 ", "--a", "w2 w3", "--b", "w4", "model.device=cpu"])
    expected = RewardModel.load(str(tiny_scorer)).compare("w1 ", "w2 w3", "w4")
    shown = capsys.readouterr().out
    for number in (
        f"{expected.score_a:.6g}",
        f"{expected.probability_a:.4f}",
        f"{expected.score_b:.6g}",
        f"{1 - expected.probability_a:.4f}",
    ):
        assert number in shown


def test_pairs_and_how_often_the_model_agrees(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = RewardModel.load(str(tiny_scorer))
    rows, right = [], 0
    for n in range(20):
        a, b = model.score([f"w{n} "] * 2, [f"w{n + 1}", f"w{n + 2} w{n + 3}"])
        chosen_first = (a > b) == (n % 4 != 0)  # the model agrees with three in four
        right += n % 4 != 0
        texts = [f"w{n + 1}", f"w{n + 2} w{n + 3}"]
        rows.append({"prompt": f"w{n} ", "chosen": texts[0 if chosen_first else 1], "rejected": texts[1 if chosen_first else 0]})
    made = run(tiny_scorer, tmp_path, rows)
    for row, given in zip(made, rows, strict=True):
        scores = model.score([given["prompt"]] * 2, [given["chosen"], given["rejected"]])
        assert (row["score_chosen"], row["score_rejected"]) == pytest.approx(tuple(scores), abs=1e-5)
        assert row["probability_chosen"] == pytest.approx(preference(*scores), abs=1e-5)
        assert {key: row[key] for key in given} == given
    assert right == 15
    assert "the better answer scores higher: 0.750 [" in capsys.readouterr().out


def test_labelled_rows_keep_their_order_and_ties_are_in_no_share(
    tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "w1 ", "response_a": "w2", "response_b": "w3 w4", "label": label} for label in ("a", "b", "tie")]
    a, b = RewardModel.load(str(tiny_scorer)).score(["w1 "] * 2, ["w2", "w3 w4"])
    for row in run(tiny_scorer, tmp_path, rows):
        assert (row["score_a"], row["score_b"], row["probability_a"]) == pytest.approx((a, b, preference(a, b)), abs=1e-5)
    shown = capsys.readouterr().out
    assert "1 tie in the labels" in shown and "0.500 of 2 rows" in shown  # one prompt: no interval


def test_an_output_is_not_written_over_unasked(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}]
    run(tiny_scorer, tmp_path, rows)
    with pytest.raises(SystemExit) as ended:
        run(tiny_scorer, tmp_path, rows * 2)
    assert ended.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert len(run(tiny_scorer, tmp_path, rows * 2, "--overwrite")) == 2


def test_rankings_get_scores_in_the_order_of_the_row(tiny_scorer: Path, tmp_path: Path) -> None:
    answers = ["w2", "w3 w4", "w5 w6 w7"]
    (made,) = run(tiny_scorer, tmp_path, [{"prompt": "w1 ", "answers": answers, "ranks": [3, 1, 2]}])
    assert made["answer_scores"] == pytest.approx(RewardModel.load(str(tiny_scorer)).score(["w1 "] * 3, answers), abs=1e-5)


def test_what_is_written_reads_as_the_same_data(tiny_scorer: Path, tmp_path: Path) -> None:
    (made,) = run(tiny_scorer, tmp_path, [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}])
    assert detect(made) == "pairs" and "probability" not in made and "p" not in made


def test_demonstrations_are_for_score(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tiny_scorer, tmp_path, [{"prompt": "w1", "completion": "w2"}])
    assert ended.value.code == 2
    assert "rlhf-dist score" in capsys.readouterr().err
