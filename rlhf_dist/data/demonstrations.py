"""Demonstrations for supervised fine-tuning: streamed from files of prompt + completion and of dialogues."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_dist.data.layouts import Demonstration
from rlhf_dist.data.reading import RecordReader


class DemonstrationReader(RecordReader):
    """Demonstrations of files of either layout; dialogues keep all their turns, so that a loss can be masked turn by turn."""

    wanted = ("demonstrations", "messages")
    what = "demonstrations"
    fix = "give files of prompt + completion or of messages that end with the assistant's (`rlhf-dist data convert` makes them of pairs)"

    def __iter__(self) -> Iterator[Demonstration]:
        for record in self.records():
            if isinstance(record, Demonstration):
                yield record
