"""The value model's worker: values of states, and its own optimiser."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.algos.objectives import ValueObjective
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.experience import ExperienceBatch, Piece
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import Needs, PieceInfo, RestInfo, UpdateInfo, UpdateRequest
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.flops import forward_flops
from rlhf_dist.models.loading import load_token_scorer, load_tokenizer
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.value import ValueModule
from rlhf_dist.workers.capsules import CapsuleWriter
from rlhf_dist.workers.export import export_model
from rlhf_dist.workers.resting import rest_engine
from rlhf_dist.workers.saving import SavedWorker
from rlhf_dist.workers.scoring import score_rows
from rlhf_dist.workers.training import Trainer, build_engine, optimizer_steps, prepare_checkpointing, seeded


class ValueWorker(SavedWorker):
    """One rank of the value model (contracts.roles.ScoringRole, TrainedRole and RestingRole)."""

    def __init__(self, config: PPOConfig, rank: Rank) -> None:
        seeded(config.run.seed)
        section = config.value
        self._budget = (section.microbatch_tokens, section.packing)
        self._tokenizer = load_tokenizer(section.model or config.policy.model, trust_remote_code=section.trust_remote_code)
        self._engine = build_engine(value_module(config), section, rank, Training(section.optim, optimizer_steps(config)))
        capsules = CapsuleWriter(self._engine, self._tokenizer, config)
        self._trainer = Trainer(self._engine, ValueObjective(config.algorithm), whitens=False, name="value", capsules=capsules)

    def costs(self) -> FlopModel:
        """What a forward of the value model costs."""
        return forward_flops(self._engine.module)

    def score(self, shard: ExperienceBatch) -> Stored[Piece, PieceInfo]:
        """Values of this rank's rows."""
        names = {"values_BT": "values_BT", "bootstrap_value_B": "bootstrap_value_B"}
        return score_rows(self._engine, shard, names, *self._budget)

    def load_experience(self, shards: Sequence[ExperienceBatch], advantages: Moments) -> int:
        """Keeps the step's experience for the updates."""
        return self._trainer.load(shards, advantages)

    def update(self, request: UpdateRequest) -> UpdateInfo:
        """One optimizer step."""
        return self._trainer.update(request)

    def rest(self, needs: Needs) -> RestInfo:
        """What the coming phase does not need leaves the device."""
        return rest_engine(self._engine, needs)

    def export(self, folder: str) -> None:
        """Writes the value model as a Hugging Face sequence-classification folder."""
        export_model(self._engine, self._engine.module.model, self._tokenizer, folder)


def value_module(config: PPOConfig) -> ValueModule:
    """The value model before its first step, with a new adapter where it trains one.

    Raises:
        UserError: the model cannot be loaded.
    """
    section = config.value
    model = load_token_scorer(section, section.model or config.policy.model, zero_head=section.head_init == "zero")
    if section.lora is not None:
        model = add_adapter(model, section.lora, config.run.seed, head="score")
    return ValueModule(prepare_checkpointing(model, section), packing=section.packing)
