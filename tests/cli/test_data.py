"""`rlhf-dist data …` as a user runs it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.data.files import iter_rows

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in iter_rows(str(path))]


def fails(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", *arguments])
    assert ended.value.code == 2


def test_validate_lists_every_bad_row_and_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "bad.jsonl", [PAIR, PAIR | {"rejected": "a"}, {"prompt": "q", "completion": "a"}, PAIR | {"chosen": " "}])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(PAIR).encode() * 50)[:-9])
    fails("validate", bad, str(cut), "--json", str(tmp_path / "faults.json"))
    out = capsys.readouterr().out
    for line in (2, 3, 4):
        assert f"{bad}:{line}: " in out
    assert "chosen equals rejected" in out and "mixed layouts" in out and "cut short" in out
    faults = json.loads((tmp_path / "faults.json").read_text())
    assert [fault["reason"] for fault in faults["faults"]] == [
        "chosen equals rejected", "mixed layouts", "empty completion", "unreadable file",
    ]  # fmt: skip
    assert (faults["rows"], faults["good"], faults["unreadable_files"]) == (4, 1, 1)


def test_validate_of_good_files_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "validate", write(tmp_path / "x.jsonl", [PAIR])])
    assert capsys.readouterr().out == "1 of 1 rows accepted\n"


def test_validate_tries_the_chat_template(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    fails("validate", write(tmp_path / "x.jsonl", [{"messages": turns}]), "--tokenizer", str(tiny_model))
    assert "no chat template" in capsys.readouterr().out


def test_stats_of_real_files(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(shared / "data" / "hh-rlhf" / f"{name}-base-test.jsonl.gz") for name in ("harmless", "helpful")]
    main(["data", "stats", *files, "--json", str(tmp_path / "stats.json")])
    report = json.loads((tmp_path / "stats.json").read_text())
    assert report["rows"] == 4666 and report["characters"]["text"]["max"] == 4327
    assert report["faults"] == {"chosen equals rejected": 2, "empty final turn": 8, "prompts differ": 14}
    assert "4,666" in capsys.readouterr().out


def test_a_zip_is_no_data_file(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails("stats", str(shared / "data" / "sentence-polarity" / "sentence_polarity.zip"))
    assert "cannot tell the format of the data file (.zip)" in capsys.readouterr().err


def test_a_split_shares_no_prompt_and_stats_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PAIR | {"prompt": ("Q" if n % 2 else "q") + f" {n % 60}", "chosen": f"a{n}", "n": n} for n in range(300)] + [
        PAIR | {"chosen": ""}
    ]
    file = write(tmp_path / "x.jsonl", rows)
    fails("split", file, "--out", str(tmp_path / "parts"))
    assert not list((tmp_path / "parts").iterdir())
    main(["data", "split", file, "--out", str(tmp_path / "parts"), "--eval", "0.3", "--seed", "5", "--errors", "drop"])
    out = capsys.readouterr().out
    parts = {name: read(tmp_path / "parts" / f"{name}.jsonl") for name in ("train", "eval")}
    assert sorted(row["n"] for part in parts.values() for row in part) == list(range(300)) and "1 empty completion" in out
    assert not {row["prompt"].lower() for row in parts["train"]} & {row["prompt"].lower() for row in parts["eval"]}
    main(["data", "stats", *(str(tmp_path / "parts" / f"{name}.jsonl") for name in parts), "--json", str(tmp_path / "s.json")])
    overlap = json.loads((tmp_path / "s.json").read_text())["overlaps"][0]
    assert overlap["equal"] == 0


@pytest.mark.parametrize("share", ["0", "1", "-0.1"])
def test_a_share_outside_0_and_1_is_refused(tmp_path: Path, share: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails("split", write(tmp_path / "x.jsonl", [PAIR]), "--out", str(tmp_path), f"--eval={share}")
    assert f"--eval is {share}" in capsys.readouterr().err


def test_an_empty_side_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails("split", write(tmp_path / "x.jsonl", [PAIR]), "--out", str(tmp_path / "parts"))
    assert "no row falls into eval" in capsys.readouterr().err


def test_endings_of_parts_follow_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(80)]
    source = write(tmp_path / "x.jsonl", rows)
    for ending in (".csv.gz", ".parquet"):
        main(["data", "convert", source, str(tmp_path / f"y{ending}"), "--to", "demonstrations"])
        main(["data", "split", str(tmp_path / f"y{ending}"), "--out", str(tmp_path / "parts")])
        parts = [read(tmp_path / "parts" / f"{name}{ending}") for name in ("train", "eval")]
        assert sorted(row["prompt"] for part in parts for row in part) == sorted(row["prompt"] for row in rows)


def test_convert_makes_pairs_of_rankings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranking = {"ask": "q", "responses": ["a", "b", "c"], "ranks": [3, 1, 2], "topic": "t"}
    file = write(tmp_path / "x.jsonl", [ranking, ranking | {"ranks": [1, 1, 2]}])
    main(["data", "convert", file, str(tmp_path / "y.parquet"), "--to", "pairs", "--column", "prompt=ask", "--errors", "drop"])
    pairs = read(tmp_path / "y.parquet")
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("b", "c"), ("b", "a"), ("c", "a")]
    assert {row["prompt"] for row in pairs} == {"q"} and {row["topic"] for row in pairs} == {"t"} and "ask" not in pairs[0]
    assert "1 ties in the ranking" in capsys.readouterr().out
    fails("convert", file, str(tmp_path / "z.jsonl"), "--to", "pairs", "--column", "prompt=ask")
    assert f"{file}:2" in capsys.readouterr().err and not (tmp_path / "z.jsonl").exists()
    fails("convert", file, file, "--to", "pairs")
    fails("convert", file, str(tmp_path / "z.jsonl"), "--to", "pairs", "--column", "nonsense=ask")


def test_balance_caps_or_weighs_several_files_into_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = write(tmp_path / "many.jsonl", [PAIR | {"prompt": f"q{n}"} for n in range(90)])
    few = write(tmp_path / "few.jsonl", [PAIR | {"prompt": f"r{n}"} for n in range(10)])
    main(["data", "balance", many, few, "--cap", "20", "--out", str(tmp_path / "capped.jsonl")])
    assert Counter(row["source"] for row in read(tmp_path / "capped.jsonl")) == {"many": 20, "few": 10}
    main(["data", "balance", many, few, "--by", "source", "--weight", "--out", str(tmp_path / "weighted.jsonl")])
    totals: Counter[str] = Counter()
    for row in read(tmp_path / "weighted.jsonl"):
        totals[row["source"]] += row["weight"]
    assert totals["many"] == pytest.approx(50) and totals["few"] == pytest.approx(50)
    assert "50.0%" in capsys.readouterr().out


def test_balance_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, prompts = write(tmp_path / "a.jsonl", [PAIR]), write(tmp_path / "b.jsonl", [{"prompt": "q"}])
    out = str(tmp_path / "out.jsonl")
    fails("balance", pairs, "--out", out)
    fails("balance", pairs, "--out", out, "--cap", "1", "--weight")
    fails("balance", pairs, prompts, "--out", out, "--weight")
    assert "differ in their layouts" in capsys.readouterr().err and not Path(out).exists()
    fails("balance", write(tmp_path / "c.jsonl", [PAIR | {"chosen": ""}]), "--out", out, "--weight", "--errors", "drop")
    assert "no good row is left" in capsys.readouterr().err
