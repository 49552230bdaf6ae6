"""One rank of a PPO run in which rank 1 alone has a loss that is not finite, its gradient being finite, in one optimizer step.

usage: skipped.py CONFIG; the last line is JSON for the harness.
"""

import math
import os
import sys

from rlhf_dist.algos.objectives import PolicyObjective
from rlhf_dist.cli.main import main
from rlhf_dist.workers.training import Trainer

SPOILT = 5
"""The first optimizer step of the second PPO step."""

state = {"steps": 0, "spoils": False}
update, objective = Trainer.update, PolicyObjective.__call__


def counted(self, request):
    state["steps"] += 1
    state["spoils"] = state["steps"] == SPOILT and os.environ["RANK"] == "1"
    return update(self, request)


def spoilt(self, outputs, microbatch):
    loss, tally = objective(self, outputs, microbatch)
    added, state["spoils"] = (math.inf if state["spoils"] else 0.0), False
    return loss + added, tally


Trainer.update, PolicyObjective.__call__ = counted, spoilt
main(["ppo", "--config", sys.argv[1]])
print("{}")
