"""One rank of a run in which rank 1 alone has a loss that is not finite, its gradient being finite, in one optimizer step.

usage: skipped.py STAGE STEP CONFIG, STAGE being ppo or dpo; the last line is JSON for the harness.
"""

import math
import os
import sys

from rlhf_dist.algos.dpo_objective import DPOObjective
from rlhf_dist.algos.objectives import PolicyObjective
from rlhf_dist.cli.main import main
from rlhf_dist.workers.dpo import DPOWorker
from rlhf_dist.workers.training import Trainer

stage, spoilt_step, config = sys.argv[1], int(sys.argv[2]), sys.argv[3]
Worker, Objective = (Trainer, PolicyObjective) if stage == "ppo" else (DPOWorker, DPOObjective)
state = {"steps": 0, "spoils": False}
update, objective = Worker.update, Objective.__call__


def counted(self, request):
    state["steps"] += 1
    state["spoils"] = state["steps"] == spoilt_step and os.environ["RANK"] == "1"
    return update(self, request)


def spoilt(self, outputs, microbatch):
    loss, tally = objective(self, outputs, microbatch)
    added, state["spoils"] = (math.inf if state["spoils"] else 0.0), False
    return loss + added, tally


Worker.update, Objective.__call__ = counted, spoilt
main([stage, "--config", config])
print("{}")
