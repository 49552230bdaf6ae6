"""`rlhf-dist report` as a user runs it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.evaluation import report_html
from rlhf_dist.rewards.scorer import RewardModel


def pairs(count: int, first: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"w{n % 60} w{(first + n) % 60} ", "chosen": f"w{n % 50}", "rejected": f"w{n % 50 + 1} w3", "source": "ab"[n % 2]}
        for n in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_report_of_a_saved_model(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(40, 7)
    long = {"prompt": "w1 " * 60, "chosen": "w2", "rejected": "w3"}
    ranking = {"prompt": "w5 ", "answers": ["w1", "w2", "w3"], "ranks": [2, 1, 3]}
    held_out = [write(tmp_path / "eval.jsonl", [*rows, long]), "--data", write(tmp_path / "ranked.jsonl", [ranking])]
    train = write(tmp_path / "train.jsonl", pairs(20, 31))
    main([
        "report", "--model", str(tiny_scorer), "--data", *held_out, "--train-data", train, "--out", str(tmp_path / "report"),
        "data.overlong=drop", "model.device=cpu",
    ])  # fmt: skip
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (tmp_path / "report" / "report.html").stat().st_size > 1_000_000
    assert report["held_out"]["pairs"] == 40 + 3 and report["train"]["pairs"] == 20
    assert report["held_out"]["fates"] == {"dropped: longer than data.max_tokens": 1} and report["train"]["fates"] == {}
    model = RewardModel.load(str(tiny_scorer))
    better, worse = (model.score([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected"))
    first, second, third = model.score(["w5 "] * 3, ["w2", "w1", "w3"])
    ranked = ((first > second) + (first > third) + (second > third)) / 3
    expected = (sum(b > w for b, w in zip(better, worse, strict=True)) + ranked) / 41
    assert report["held_out"]["accuracy"]["mean"] == pytest.approx(expected)
    assert report["baselines"]["shorter answer wins"]["mean"] == pytest.approx((40 + 0.5) / 41)
    assert {bucket["label"]: bucket["accuracy"]["n"] for bucket in report["by_source"]} == {"a": 20, "b": 20, "ranked": 3}
    shown = capsys.readouterr().out
    assert "Accuracy, held out" in shown and "report.html" in shown


def test_faults_are_one_message(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(data: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["report", "--model", str(tiny_scorer), "--data", data, "--out", str(tmp_path / "report"), "model.device=cpu"])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "not preferences" in fails(write(tmp_path / "a.jsonl", [{"prompt": "w1", "completion": "w2"}]))
    tie = {"prompt": "w1 ", "response_a": "w2", "response_b": "w3", "label": "tie"}
    assert "no held-out comparison prefers" in fails(write(tmp_path / "b.jsonl", [tie]))
    assert "same text" in fails(write(tmp_path / "c.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w2"}]))
    assert not (tmp_path / "report").exists()
    (tmp_path / "report").write_text("mine")
    assert "a file of this name" in fails(str(tmp_path / "b.jsonl"))


def test_the_place_is_looked_at_before_the_model_is_loaded_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", pairs(3, 7))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "report.html").write_text("mine")
    for place, said in ((f"{data}/report", "cannot write"), (str(tmp_path / "taken"), "--overwrite")):
        with pytest.raises(SystemExit) as ended:
            main(["report", "--model", "/no/model", "--data", data, "--out", place])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and "no model folder" not in error
    assert (tmp_path / "taken" / "report.html").read_text() == "mine"


def test_a_disk_that_takes_no_more_is_one_message(
    tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report_html, "write_text", full)
    data = write(tmp_path / "a.jsonl", pairs(3, 7))
    with pytest.raises(SystemExit) as ended:
        main(["report", "--model", str(tiny_scorer), "--data", data, "--out", str(tmp_path / "r"), "model.device=cpu"])
    assert ended.value.code == 2 and "cannot write: No space left" in capsys.readouterr().err


def test_it_replaces_a_report_where_asked(tiny_scorer: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "report.html").write_text("mine")
    data = write(tmp_path / "a.jsonl", pairs(3, 7))
    main(["report", "--model", str(tiny_scorer), "--data", data, "--out", str(tmp_path / "taken"), "--overwrite", "model.device=cpu"])
    assert (tmp_path / "taken" / "report.html").stat().st_size > 1_000_000


def test_a_train_side_without_a_preference_is_shown(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ties = [{"prompt": f"w{n} ", "response_a": "w2", "response_b": "w3", "label": "tie"} for n in range(5)]
    data, train = write(tmp_path / "a.jsonl", pairs(3, 7)), write(tmp_path / "b.jsonl", ties)
    main(["report", "--model", str(tiny_scorer), "--data", data, "--train-data", train, "--out", str(tmp_path / "r"), "model.device=cpu"])
    assert "Rows, train" in capsys.readouterr().out
    assert json.loads((tmp_path / "r" / "report.json").read_text())["train"]["ties"] == 5
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "5 comparisons of 5 prompts, 5 ties, in no accuracy" in page and "none of these comparisons prefers" in page
