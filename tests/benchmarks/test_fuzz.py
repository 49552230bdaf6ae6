"""A few hundred damaged files: none does harm, and what would do harm is seen."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import damaged_files
import fuzz
import judging
import pytest
from damaged_files import KINDS, LAYOUTS, Cases
from judging import BadData, judge_data
from mutations import damaged_bytes, damaged_values

from rlhf_dist.config.errors import UserError


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases(7)


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_does_harm(cases: Cases, kind: str) -> None:
    found = [cases.judge(kind, number) for number in range(15)]
    assert [each for each in found if each[0] not in fuzz.GOOD] == []
    assert sum(outcome == "refused" for outcome, _ in found) >= 5
    assert cases.judge(kind, 3) == found[3], "a seed, a kind and a number give the same case again"


@pytest.mark.parametrize("ending", damaged_files.DATA)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_files_are_accepted_as_they_are(tmp_path: Path, ending: str, layout: str) -> None:
    import gzip

    if ending.startswith("csv") and layout not in damaged_files.FLAT:
        pytest.skip("CSV has no lists")
    content = damaged_files._encoded(LAYOUTS[layout], ending.removesuffix(".gz"))
    (tmp_path / f"rows.{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert judge_data(tmp_path / f"rows.{ending}", LAYOUTS[layout]) == "equal"


def test_damage_is_drawn_and_leaves_the_original() -> None:
    rows = LAYOUTS["pairs"]
    before = json.dumps(rows)
    changed = [damaged_values(rows, random.Random(n)) for n in range(50)]
    assert json.dumps(rows) == before and sum(each != rows for each in changed) >= 40
    assert len({damaged_bytes(b"0123456789" * 9, random.Random(n)) for n in range(50)}) >= 30


def test_bad_data_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that drops a row, or half of one."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(damaged_files._encoded(LAYOUTS["pairs"], "jsonl"))
    whole = judging.typed_rows
    monkeypatch.setattr(judging, "typed_rows", lambda name: list(whole(name))[1:])
    with pytest.raises(BadData, match="7 rows of 8"):
        judge_data(path, LAYOUTS["pairs"])

    def halved(name: str) -> list[Any]:
        found = list(whole(name))
        found[2].row["chosen"] = found[2].row["chosen"][:-1]
        return found

    monkeypatch.setattr(judging, "typed_rows", halved)
    with pytest.raises(BadData, match="is not"):
        judge_data(path, LAYOUTS["pairs"])


def test_tracebacks_and_refusals_are_told_apart(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception) -> Any:
        def judge(*_: Any) -> str:
            raise error

        return judge

    monkeypatch.setitem(KINDS, "x", raises(KeyError("a")))
    outcome, detail = cases.judge("x", 0)
    assert outcome == "TRACEBACK" and "KeyError: 'a'" in detail
    monkeypatch.setitem(KINDS, "x", raises(UserError("no", where="here")))
    assert cases.judge("x", 0)[0] == "refused"
    monkeypatch.setitem(KINDS, "x", raises(UserError("half a pair: \ud83d")))
    assert cases.judge("x", 0)[0] == "TRACEBACK", "a message that cannot be printed"


class Pipe:
    """The other process, as the test has it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def send(self, _: Any) -> None:
        """Nothing."""

    def poll(self, limit_s: float) -> bool:
        return self.answer is not None

    def recv(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "outcome"), [(None, "HANG"), (("equal", "", 1000), "equal"), (("equal", "", 10**7), "MEMORY"), (EOFError(), "CRASH")]
)
def test_hangs_crashes_and_memory_are_seen(answer: Any, outcome: str) -> None:
    class Dead:
        exitcode = -11

        def join(self) -> None:
            """It is."""

    reader = fuzz.Reader.__new__(fuzz.Reader)
    reader._pipe, reader._process, reader._peak = Pipe(answer), Dead(), 1000  # type: ignore[assignment]
    assert reader.read("jsonl", 0, 0.1)[0] == outcome


@pytest.mark.slow
def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    fuzz.main(files=28, seed=3, first=0, only="", limit_s=30.0, results=tmp_path)
    report = json.loads((tmp_path / "fuzz.json").read_text())
    assert sum(sum(counts.values()) for counts in report["outcomes"].values()) == 28 and list(report["outcomes"]) == list(KINDS)
    assert report["bad"] == [] and 0 < report["seconds"] <= time.monotonic() - began and report["manifest"]["workload"]["seed"] == 3
    assert "BAD DATA" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no kind"):
        list(fuzz.fuzz(1, 0, 1.0, only="tar"))
