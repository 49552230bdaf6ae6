"""Two ranks exchange through SpmdGroup; prints what each saw."""

import json
import os

from rlhf_dist.contracts.group import Stored
from rlhf_dist.engines.process import start_process_group, stop_process_group
from rlhf_dist.workers.spmd_group import SpmdGroup, agree, any_rank


class Worker:
    def __init__(self, rank):
        self.rank = rank

    def make(self, base):
        return Stored([base + self.rank], base + self.rank)

    def add(self, parts, own):
        return sum(x for part in parts for x in part) + own


def failing():
    raise ValueError("on rank 0")


environment = os.environ
rank = start_process_group(int(environment["RANK"]), 2, 0, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
group = SpmdGroup("policy", Worker(rank.rank), rank)
handles = group.submit(Worker.make, [(10,), (10,)])
records = group.collect(handles)
added = group.collect(group.submit(Worker.add, [(handles, 0), (handles, 1)]))
try:
    agree(rank, failing)
    disagreed = "nothing"
except (ValueError, SystemExit) as error:
    disagreed = type(error).__name__
agreed = agree(rank, lambda: f"from rank {rank.rank}")
stopping = [any_rank(rank, rank.rank == 1), any_rank(rank, False)]
stop_process_group()
print(json.dumps({"records": records, "sum": added, "agreed": agreed, "disagreed": disagreed, "stopping": stopping}))
