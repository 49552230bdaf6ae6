"""`rlhf-dist score` as a user runs it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.data.files import iter_rows
from rlhf_dist.data.writing import RowWriter
from rlhf_dist.rewards.scorer import RewardModel

ROWS = [{"prompt": f"w{n} ", "completion": " ".join(f"w{n + k}" for k in range(1 + n % 5)), "mine": n} for n in range(1, 30)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["score", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_one_text(tiny_scorer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["score", "--model", str(tiny_scorer), "--prompt", "w1 w2 ", "--completion", "w3", "model.device=cpu"])
    (expected,) = RewardModel.load(str(tiny_scorer)).score(["w1 w2 "], ["w3"])
    assert capsys.readouterr().out == f"score: {expected:.6g}\n"


def test_a_chat(tiny_scorer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["score", "--model", str(tiny_scorer), "--prompt", "w1 w2", "--completion", "w3", "--chat", "model.device=cpu"])
    (expected,) = RewardModel.load(str(tiny_scorer)).score([[{"role": "user", "content": "w1 w2"}]], ["w3"])
    assert capsys.readouterr().out == f"score: {expected:.6g}\n"


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv.gz"])
def test_a_file_keeps_its_columns_and_gets_one(tiny_scorer: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"scored{ending}"
    main(["score", "-m", str(tiny_scorer), "--data", write(tmp_path / "rows.jsonl", ROWS), "--output", str(out), "model.device=cpu"])
    scored = [row for _, row in iter_rows(str(out))]
    expected = RewardModel.load(str(tiny_scorer)).score([r["prompt"] for r in ROWS], [r["completion"] for r in ROWS])
    assert [float(row["score"]) for row in scored] == pytest.approx(expected, abs=1e-5)
    assert [{key: str(row[key]) for key in ROWS[0]} for row in scored] == [{key: str(value) for key, value in row.items()} for row in ROWS]
    shown = capsys.readouterr().out
    assert "29 of 29 rows accepted" in shown and f"29 rows in {out}" in shown and "median" in shown


def test_dialogues_and_rows_that_do_not_fit(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [[{"role": "user", "content": f"w{n} " * length}, {"role": "assistant", "content": "w9"}] for n, length in ((1, 1), (2, 60))]
    data, out = write(tmp_path / "x.jsonl", [{"messages": each} for each in turns]), tmp_path / "out.jsonl"
    arguments = ("--model", str(tiny_scorer), "--data", data, "--output", str(out), "model.device=cpu")
    assert "limit is 32" in fails(capsys, *arguments) and not out.exists()
    main(["score", *arguments, "data.overlong=drop"])
    assert [row["messages"] for _, row in iter_rows(str(out))] == [turns[0]]
    assert "1 dropped: longer" in capsys.readouterr().out
    assert "exists" in (said := fails(capsys, *arguments, "data.overlong=truncate")) and "--overwrite" in said
    assert [row["messages"] for _, row in iter_rows(str(out))] == [turns[0]], "as it was"
    main(["score", *arguments, "--overwrite", "data.overlong=truncate"])
    (expected,) = RewardModel.load(str(tiny_scorer), overlong="truncate").score([turns[1][:1]], ["w9"])
    assert [row["score"] for _, row in iter_rows(str(out))][1] == pytest.approx(expected, abs=1e-5)
    assert "1 cut: prompts shortened" in capsys.readouterr().out


def test_a_chat_that_the_template_refuses_is_a_fault(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(tiny_scorer, tmp_path / "m")
    refuses = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refuses + "{% for m in messages %}{{ m['content'] }} {% endfor %}")
    rows = [{"messages": [{"role": role, "content": "w1"}, {"role": "assistant", "content": "w9"}]} for role in ("user", "tool")]
    data, out = write(tmp_path / "x.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ("--model", str(model), "--data", data, "--output", str(out), "model.device=cpu")
    said = fails(capsys, *arguments)
    assert "x.jsonl:2" in said and "no tools" in said and "data.faults=drop" in said
    main(["score", *arguments, "data.faults=drop"])
    assert [row["messages"] for _, row in iter_rows(str(out))] == [rows[0]["messages"]]
    assert "refused by the chat template" in capsys.readouterr().out


def test_faults_are_one_message(tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = ("--model", str(tiny_scorer)), ("--output", str(tmp_path / "out.jsonl"))
    lost = write(tmp_path / "a.jsonl", [ROWS[0], {"prompt": "w1", "completion": None}])
    assert "'completion' is null" in (said := fails(capsys, *model, *out, "--data", lost)) and "a.jsonl:2" in said
    assert "rlhf-dist compare" in fails(
        capsys, *model, *out, "--data", write(tmp_path / "b.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    )
    assert "has a column 'score' already" in fails(capsys, *model, *out, "--data", write(tmp_path / "c.jsonl", [ROWS[0] | {"score": 1}]))
    assert "c.jsonl" in fails(capsys, *model, "--data", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "c.jsonl"))
    assert "nothing.jsonl" in fails(capsys, *model, *out, "--data", str(tmp_path / "nothing.jsonl"))
    assert "columns: text" in fails(capsys, *model, *out, "--data", write(tmp_path / "d.jsonl", [{"text": "w1"}]))
    assert "only a part" in fails(capsys, *model, "--prompt", "w1")
    assert "no model folder" in fails(capsys, "--model", str(tmp_path / "none"), "--prompt", "w1", "--completion", "w2")
    assert "did you mean 'max_tokens'" in fails(capsys, *model, "--prompt", "w1", "--completion", "w2", "data.max_tokns=4")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", ROWS)
    for place, said in ((f"{data}/out.jsonl", "cannot write"), (str(tmp_path / "out.txt"), "which format"), (data, "one of the inputs")):
        for verb in ("score", "compare"):
            with pytest.raises(SystemExit) as ended:
                main([verb, "--model", "/no/model", "--data", data, "--output", place])
            error = capsys.readouterr().err
            assert ended.value.code == 2 and said in error and "no model folder" not in error


def test_a_disk_that_takes_no_more_is_one_message(
    tiny_scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RowWriter, "write", full)
    out = tmp_path / "out.jsonl"
    said = fails(capsys, "--model", str(tiny_scorer), "--data", write(tmp_path / "a.jsonl", ROWS), "--output", str(out), "model.device=cpu")
    assert "No space left" in said and not list(tmp_path.glob("*out*"))
