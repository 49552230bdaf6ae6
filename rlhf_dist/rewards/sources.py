"""A reward of the config, ready to be asked, with its rules for failures."""

from __future__ import annotations

from rlhf_dist.config.rewards import FunctionReward as FunctionSection
from rlhf_dist.config.rewards import HttpReward as HttpSection
from rlhf_dist.rewards.guard import GuardedReward
from rlhf_dist.rewards.isolated import FunctionReward


def guarded(source: FunctionSection | HttpSection) -> GuardedReward:
    """Starts the function's process, or gets ready to ask the endpoint.

    Raises:
        UserError: the function cannot be loaded, or the environment lacks the endpoint's token.
    """
    if isinstance(source, FunctionSection):
        return GuardedReward(FunctionReward(source.name, source.path, source.start_timeout_s), source)
    from rlhf_dist.rewards.http import HttpReward  # late: most runs have no endpoint

    return GuardedReward(HttpReward(source), source)
