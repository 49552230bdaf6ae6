"""Where failed samples go: `quarantine.jsonl`, one JSON object a line, written by the rank that saw the failure.

Text never passes through the coordinator (law 7). Each line is one appending write, so ranks do not tear each other's lines (a network file
system may not append atomically over several machines). A sample that fails again on a step that is replayed has the same `stream`, `step`,
`prompt_id` and `sample_index`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.reward import RewardFailure


@dataclass(frozen=True)
class Quarantine:
    """A file of failed samples.

    path: of the file, made with the first line. rank: of the rewards, written into each line.
    """

    path: str
    rank: int

    def add(self, reward: str, samples: ExperienceBatch, failures: Mapping[int, RewardFailure], stream: str, step: int | None) -> None:
        """Appends a line for each row that failed.

        Args:
            reward: its name. samples: rows as they were judged. failures: by row of them. stream, step: what the samples were made for.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                for row, failure in failures.items():
                    line = json.dumps(_entry(samples, row, failure, {"stream": stream, "step": step, "reward": reward, "rank": self.rank}))
                    _append(file, line.encode() + b"\n")
            finally:
                os.close(file)
        except OSError as error:
            fix = "make room, or see that the run folder can be written on the reward ranks' machines"
            raise UserError(f"a failed sample cannot be written down: {error.strerror}", where=self.path, fix=fix) from None


def _append(file: int, line: bytes) -> None:
    if os.write(file, line) != len(line):
        raise OSError(0, "the disk took only a part of a line")


def _entry(samples: ExperienceBatch, row: int, failure: RewardFailure, where: dict[str, Any]) -> dict[str, Any]:
    return {
        **where,
        "prompt_id": int(samples.prompt_id_B[row]),
        "sample_index": int(samples.sample_index_B[row]),
        "policy_version": int(samples.policy_version_B[row]),
        "kind": failure.kind,
        "message": failure.what,
        "where": failure.where,
        "traceback": failure.trace,
        "rows_of_call": failure.rows,
        "call_failed": failure.of_call,
        "prompt": samples.prompts[row],
        "completion": samples.completions[row],
    }
