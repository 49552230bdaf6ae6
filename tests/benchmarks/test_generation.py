"""The script whole, on the smallest model: native beside `generate`; beside vLLM where RLHF_DIST_VLLM_PYTHON names a Python that has it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import generation
import pytest
import typer

VLLM = os.environ.get("RLHF_DIST_VLLM_PYTHON", "")
TINY: dict[str, Any] = {"hidden": 64, "layers": 2, "rows": 4, "limit": 8, "repeats": 1, "warm_up": 1, "threads": 1}


def run(folder: Path, sides: str, vllm: Path | None = None, compiled: bool = False) -> tuple[str, dict[str, Any]]:
    generation.main(vllm, sides, "", dtype="float32", ragged=True, compiled=compiled, results=folder, **TINY)
    (path,) = folder.glob("*.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return path.stem, report


@pytest.mark.slow
def test_sides_make_the_same_tokens_and_say_how(tmp_path: Path) -> None:
    name, report = run(tmp_path, "generate")
    assert name == "generation_llama64x2_cpu_ragged_float32_r4_t1"
    native, other = report["native"], report["generate"]
    assert native["workload"] == other["workload"] and native["workload"]["rows"] == 4
    assert native["settings"] == {"slots": 4, "attention": "sdpa"} and other["settings"]["cache"] == "dynamic"
    assert report["logprob_gap"]["native"]["largest"] < 1e-4
    assert report["native_is_faster"]["generate"]["median"] == pytest.approx(
        report["seconds"]["generate"]["median"] / report["seconds"]["native"]["median"]
    )


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="RLHF_DIST_VLLM_PYTHON names no interpreter with vLLM")
def test_vllm_says_whether_it_ran_eager_or_compiled(tmp_path: Path) -> None:
    _, report = run(tmp_path, "vllm", Path(VLLM))
    assert report["vllm"]["settings"]["execution"] == "eager" and "vllm" in report["vllm"]["versions"]
    assert report["vllm"]["settings"]["slots"] == report["native"]["settings"]["slots"]


def test_sides_that_are_not_there_are_refused() -> None:
    assert generation.chosen("", None) == ["native", "generate", "continuous"]
    assert generation.chosen("generate", Path("python")) == ["native", "generate"]
    for sides, vllm in (("vllm", None), ("others", Path("python"))):
        with pytest.raises(typer.BadParameter, match="is none of"):
            generation.chosen(sides, vllm)
