"""The script once, from end to end, on the smallest model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import weight_sync

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_every_transport_moves_the_whole_model_in_buckets(tmp_path: Path, ray_session: None) -> None:
    weight_sync.main("", hidden=64, layers=2, dtype="bf16", bucket_mib=0.05, repeats=2, warm_up=1, threads=1, results=tmp_path)
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    work = report["manifest"]["workload"]
    assert work["bytes"] > 32000 * 64 * 2 and work["buckets"] > 2 and report["manifest"]["versions"]["ray"]
    for transport in ("copies", *weight_sync.TRANSPORTS):
        seconds, rate = report["seconds"][transport], report["gb_per_second"][transport]
        assert seconds["count"] == 2 and 0 < seconds["low"] <= seconds["high"]
        assert rate["high"] == pytest.approx(work["bytes"] / 1e9 / seconds["low"])
