"""One command line for two scripts: what is given wins, the script's own sizes stand otherwise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from options import Options, command
from workload import Shape


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> Options:
    seen: list[Options] = []
    monkeypatch.setattr(sys, "argv", ["script", *words])
    with pytest.raises(SystemExit) as ended:
        command(seen.append, Options(rows=16, limit=96))
    assert not ended.value.code
    return seen[0]


def test_what_is_not_given_is_the_scripts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch) == Options(rows=16, limit=96)
    assert Options(rows=16, limit=96).repeats == 5, "medians are of five at least"


def test_what_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parsed(
        monkeypatch, "--full", "--dtype", "bfloat16", "--hidden", "64", "--results", "there", "policy.packing=true", "--rows", "8"
    )
    assert given == Options(
        8, 96, "bfloat16", False, shape=Shape(hidden=64), overrides=("policy.packing=true",), results=Path("there")
    )  # fmt: skip
    assert given.workload["overrides"] == ["policy.packing=true"] and given.workload["hidden"] == 64 and given.lengths == "full"
