from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.metrics import MetricsWriter, read_metrics


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


@pytest.fixture
def writer(folder: RunFolder) -> Iterator[MetricsWriter]:
    made = MetricsWriter(folder)
    yield made
    made.close()


def scalars(folder: RunFolder, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_step_is_readable_at_once_and_bit_for_bit(folder: RunFolder, writer: MetricsWriter) -> None:
    writer.write(1, {"objective/kl": 0.1 + 0.2, "val/ratio": 1})
    record = read_metrics(folder.metrics)[0]
    assert record["step"] == 1 and record["objective/kl"] == 0.1 + 0.2 and record["val/ratio"] == 1
    assert record["time"] > 1.7e9
    writer.write(2, {"objective/kl": -3.5})
    assert [r["step"] for r in read_metrics(folder.metrics)] == [1, 2]


def test_tensorboard_sees_the_same_numbers_while_the_run_lives(folder: RunFolder, writer: MetricsWriter) -> None:
    for step, value in ((1, 0.5), (2, 0.25)):
        writer.write(step, {"objective/kl": value})
    assert scalars(folder, "objective/kl") == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), torch.tensor(float("nan")), "0.3x", None])
def test_a_metric_that_is_no_number_stops_and_is_named(folder: RunFolder, writer: MetricsWriter, bad: object) -> None:
    with pytest.raises(UserError, match="loss/policy_avg") as error:
        writer.write(3, {"objective/kl": 1.0, "loss/policy_avg": bad})  # type: ignore[dict-item]
    assert "step 3" in str(error.value)
    assert read_metrics(folder.metrics) == []


def test_an_integer_that_a_float_would_round_is_kept_digit_by_digit(folder: RunFolder, writer: MetricsWriter) -> None:
    """A checksum: TensorBoard holds floats, so it is not shown there."""
    writer.write(1, {"weight_sync/checksum": 2**60 + 1, "weight_sync/bytes": 2**53})
    writer.close()
    assert read_metrics(folder.metrics)[0]["weight_sync/checksum"] == 2**60 + 1
    assert scalars(folder, "weight_sync/bytes") == [(1, 2.0**53)]
    with pytest.raises(KeyError):
        scalars(folder, "weight_sync/checksum")


def test_scalars_of_numpy_and_torch_are_numbers(folder: RunFolder, writer: MetricsWriter) -> None:
    writer.write(1, {"a": np.float32(0.5), "b": torch.tensor(2.0)})  # type: ignore[dict-item]
    record = read_metrics(folder.metrics)[0]
    assert (record["a"], record["b"]) == (0.5, 2.0)


def test_reserved_names_are_refused(writer: MetricsWriter) -> None:
    with pytest.raises(ValueError, match="'step'"):
        writer.write(1, {"step": 1.0})


def test_each_line_is_one_json_object(folder: RunFolder, writer: MetricsWriter) -> None:
    wide = {f"rewards/part_{i}": float(i) for i in range(2000)}  # beyond any stream buffer
    writer.write(1, wide)
    text = folder.metrics.read_text()
    assert text.endswith("\n") and text.count("\n") == 1
    assert {key: value for key, value in json.loads(text).items() if key in wide} == wide


def test_close_twice_and_append_later(folder: RunFolder) -> None:
    for step in (1, 2):
        writer = MetricsWriter(folder)
        writer.write(step, {"a": float(step)})
        writer.close()
        writer.close()
    assert [record["a"] for record in read_metrics(folder.metrics)] == [1.0, 2.0]


def test_reading_names_the_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a"')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1"):
        read_metrics(path)
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "absent.jsonl")


def test_rewound_lines_are_gone_and_what_comes_then_stands_once(folder: RunFolder, writer: MetricsWriter) -> None:
    writer.write(1, {"a": 1.0})
    position = writer.position
    for step in (2, 3):
        writer.write(step, {"a": float(step)})
    writer.rewind(1, position)
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1] and writer.position == position
    writer.write(2, {"a": 20.0})
    assert [record["a"] for record in read_metrics(folder.metrics)] == [1.0, 20.0]
    writer.close()
    assert scalars(folder, "a") == [(1, 1.0), (2, 20.0)], "TensorBoard shows each step once too"


def test_a_line_that_was_cut_by_a_death_is_rewound_too(folder: RunFolder) -> None:
    writer = MetricsWriter(folder)
    writer.write(1, {"a": 1.0})
    position = writer.position
    writer.close()
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "a"')
    again = MetricsWriter(folder)
    again.rewind(1, position)
    again.write(2, {"a": 2.0})
    again.close()
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1, 2]


def test_lines_that_a_crash_of_the_machine_took_are_said_to_be_lost(writer: MetricsWriter, folder: RunFolder) -> None:
    """No weight depends on them, so the run goes on, with whole lines."""
    writer.write(1, {"a": 1.0})
    writer.sync()
    position = writer.position
    writer.write(2, {"a": 2.0})
    whole = writer.position
    os.truncate(folder.metrics, whole - 5)
    assert "lacks 5 bytes that it had at step 2: lines of metrics are lost" in writer.rewind(2, whole)
    assert writer.position == position
    writer.write(3, {"a": 3.0})
    assert [line["step"] for line in read_metrics(folder.metrics)] == [1, 3]
    assert writer.rewind(1, position) == ""
