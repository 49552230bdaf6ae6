"""Metrics of a run: one JSON line a step, and the same numbers as TensorBoard scalars."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rlhf_dist.config.errors import UserError, writing
from rlhf_dist.runs.folder import RunFolder

RESERVED = ("step", "time")
ROOM = 64 * 2**10
"""Bytes that the metrics of a step may need at most, in both files."""
EXACT = 2**53
"""Up to here every integer is a float."""


class MetricsWriter:
    """Appends to `metrics.jsonl` and to the TensorBoard events of a run folder. Used by one process (rank 0)."""

    def __init__(self, folder: RunFolder) -> None:
        self._file = os.open(folder.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._where = str(folder.metrics)
        self._events = str(folder.tensorboard)
        self._tensorboard = SummaryWriter(self._events)
        self._open = True

    @property
    def position(self) -> int:
        """Bytes written so far: what `rewind` goes back to."""
        return os.fstat(self._file).st_size

    def sync(self) -> None:
        """Brings the lines to disk: a checkpoint counts on them."""
        with writing(self._where):
            os.fsync(self._file)

    def rewind(self, step: int, position: int) -> str:
        """Forgets what was written after a position; TensorBoard hides events after `step`.

        Returns:
            A warning where the file is shorter than that, as after a crash of the machine: then whole lines are all that is left. No weight
            depends on them.
        """
        if position == self.position == 0:
            return ""
        short = position - self.position
        with writing(self._where):
            os.ftruncate(self._file, position if short <= 0 else self._whole_lines())
            self._tensorboard.close()
            self._tensorboard = SummaryWriter(self._events, purge_step=step + 1)
        return f"warning: {self._where} lacks {short} bytes that it had at step {step}: lines of metrics are lost" if short > 0 else ""

    def _whole_lines(self) -> int:
        """Bytes up to the end of the last whole line."""
        return Path(self._where).read_bytes().rfind(b"\n") + 1

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes all metrics of a step, or none of them.

        Args:
            step: PPO steps done.
            metrics: finite numbers by name; names use `/` as TensorBoard does. An integer that a float would round (a checksum) stands in
                the line digit by digit, and in TensorBoard not at all.

        Raises:
            UserError: a metric that is NaN, infinite or no number. Nothing has been written then.
            ValueError: a metric called `step` or `time`.
        """
        now = time.time()
        values = {name: _checked(name, value, step) for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": now, **values}, allow_nan=False) + "\n"
        with writing(self._where):
            self._check_room()
            self._append(line.encode())
            for name, value in ((name, value) for name, value in values.items() if isinstance(value, float)):
                self._tensorboard.add_scalar(name, value, global_step=step, walltime=now)
            self._tensorboard.flush()

    def close(self) -> None:
        """Closes both files. Safe to call twice."""
        if self._open:
            self._open = False
            os.close(self._file)
            with suppress(OSError):  # the disk is full: whoever wrote last was told
                self._tensorboard.close()

    def _check_room(self) -> None:
        """TensorBoard writes in a thread of its own, where a full disk would be a traceback."""
        disk = os.fstatvfs(self._file)
        if disk.f_bavail * disk.f_frsize < ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _append(self, line: bytes) -> None:
        """One unbuffered call, so that a killed run leaves whole lines."""
        written = os.write(self._file, line)
        if written != len(line):
            raise UserError(
                "the disk took only a part of a metrics line", where=self._where, fix="free space on the disk of run.output_dir"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, oldest first: `step`, `time` and the metrics of the step.

    Raises:
        UserError: unreadable file, or a line that is not a JSON object (named by its number).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the metrics: {error.strerror}", where=str(path), fix="pass the folder of a run") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the metrics are not UTF-8: {error.reason}", where=str(path), fix="put the file back as the run left it") from None
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"not JSON: {error}", where=where, fix="remove the line; it was cut when the run was killed or the disk was full"
        ) from None
    if not isinstance(record, dict) or "step" not in record:
        raise UserError("not a metrics record", where=where, fix="pass a metrics.jsonl that a run wrote")
    return record


def _checked(name: str, value: Any, step: int) -> float | int:
    if name in RESERVED:
        raise ValueError(f"a metric may not be called {name!r}")
    if isinstance(value, int) and abs(value) > EXACT:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"metric {name!r} is {value!r}, not a number", where=f"step {step}", fix="report it: a metric must be a number"
        ) from None
    if not math.isfinite(number):
        raise UserError(
            f"metric {name!r} is {number}",
            where=f"step {step}",
            fix="training has diverged or the metric was computed over nothing; lower the learning rate, look at the last rollouts",
        )
    return number
