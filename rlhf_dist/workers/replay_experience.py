"""Policy and value of PPO, as a replay needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_dist.algos.objectives import ValueObjective
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import Objective, Outputs
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.runs.capsule import CONFIG, Capsule
from rlhf_dist.workers.policy import policy_module, policy_objective
from rlhf_dist.workers.replay_subject import Look, alone, rebuilt, token_fault
from rlhf_dist.workers.value import value_module

READ = {
    "policy": (("old_logprobs_BT", "rollout_logprobs_BT", "advantages_BT"), ("logprobs_BT", "entropy_BT")),
    "value": (("values_BT", "returns_BT"), ("values_BT",)),
}
"""What the losses are made of: of the experience, and of the model's answer. In this order a fault is looked for."""


class ExperienceSubject:
    """See `workers.replay_subject.Subject`.

    Raises:
        UserError: see `rebuilt`.
    """

    def __init__(self, capsule: Capsule) -> None:
        config = load_config(PPOConfig, capsule.folder / CONFIG)
        self._capsule, self._read = capsule, READ[capsule.facts.role]
        section: Any = getattr(config, capsule.facts.role)
        self.dtype = section.dtype
        self.objective: Objective
        if capsule.facts.role == "policy":
            self.objective = policy_objective(config)
            self.module: Any = rebuilt(capsule, section, lambda built: policy_module(config.model_copy(update={"policy": built})))
            return
        if section.lora is None:
            section = section.model_copy(update={"head_init": "keep"})
        self.objective = ValueObjective(config.algorithm)
        self.module = rebuilt(capsule, section, lambda built: value_module(config.model_copy(update={"value": built})))

    def rows(self, rank: int) -> ExperienceBatch:
        """The rows of a rank."""
        return self._capsule.experience(rank)

    def batch(self, rows: ExperienceBatch, places: Sequence[int]) -> ExperienceBatch:
        """A microbatch of them."""
        return rows.select(places)

    def looks(self, rows: ExperienceBatch, places: Sequence[int], outputs: Outputs) -> Iterator[Look]:
        """The microbatch row by row."""
        for number, place in enumerate(places):
            row = rows.select([place])
            answers = alone(outputs, [number], row)
            name = f"prompt {int(row.prompt_id_B[0])}, sample {int(row.sample_index_B[0])}"
            texts = {"prompt": row.prompts[0], "completion": row.completions[0]}
            yield Look(name, int(row.valid_tokens_B[0]), self._fault(row, answers), texts, row, answers)

    def _fault(self, row: ExperienceBatch, outputs: Outputs) -> str:
        given, answered = self._read
        named = [(name, getattr(row, name)) for name in given] + [(f"the model's {name}", outputs[name]) for name in answered]
        return next((fault for name, values in named if (fault := token_fault(name, values, row))), "")
