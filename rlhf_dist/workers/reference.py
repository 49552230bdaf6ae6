"""The reference's worker: log-probs of the frozen initial policy."""

from __future__ import annotations

from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.experience import ExperienceBatch, Piece
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import Needs, PieceInfo, RestInfo
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.loading import load_causal_lm
from rlhf_dist.models.logprobs import HeadOptions
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.workers.resting import rest_engine
from rlhf_dist.workers.scoring import score_rows
from rlhf_dist.workers.training import build_engine


class ReferenceWorker:
    """One rank of the reference (contracts.roles.ScoringRole and RestingRole)."""

    def __init__(self, config: PPOConfig, rank: Rank) -> None:
        section = config.reference
        model = load_causal_lm(section, section.model or config.policy.model)
        self._budget = (section.microbatch_tokens, section.packing)
        module = PolicyModule(model, HeadOptions(config.rollout.temperature), packing=section.packing)
        self._engine = build_engine(module, section, rank)

    def score(self, shard: ExperienceBatch) -> Stored[Piece, PieceInfo]:
        """Reference log-probs of this rank's rows."""
        return score_rows(self._engine, shard, {"logprobs_BT": "ref_logprobs_BT"}, *self._budget)

    def rest(self, needs: Needs) -> RestInfo:
        """What the coming phase does not need leaves the device."""
        return rest_engine(self._engine, needs)
