"""The script whole, on the smallest model, each variant in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import finetuning
import pytest

pytestmark = pytest.mark.slow


def in_this_process(script: str, job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """In the place of a fresh Python."""
    given = dict(job)
    return asdict(finetuning.measure(given.pop("variant"), finetuning.Job(**given)))


def test_every_variant_trains_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "in_a_process", in_this_process)
    finetuning.main(
        "", 256, 4, "bf16", rows=2, length=8, steps=2, rank=4, repeats=1, threads=1, device="cpu", checkpointing=False, results=tmp_path,
        job="",
    )  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert path.stem == "finetuning_llama256x4_cpu_bf16_b2x8_t1"
    assert report["manifest"]["workload"]["model"] == "random Llama, hidden 256, layers 4" and report["manifest"]["repeats"] == 1
    full, lora, qlora = (report["runs"][variant][0] for variant in finetuning.VARIANTS)
    assert full["trained_parameters"] == full["parameters"]
    assert 0 < lora["trained_parameters"] == qlora["trained_parameters"] < 0.1 * full["parameters"]
    for each in (full, lora, qlora):
        assert each["tokens_per_second"] > 0 and each["training_mib"] > 0 and len(each["losses"]) == 3
    assert full["losses"][2] < full["losses"][0], "it trains"
    assert report["ratio_to_full"]["full"] == {"tokens_per_second": 1.0, "training_mib": 1.0, "process_mib": 1.0}
