"""The update phase: epochs of minibatches, policy and value side by side, or one after the other where groups take turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_dist.algos.losses import denominator
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.group import Handle, WorkerGroup
from rlhf_dist.contracts.roles import Fault, TrainedRole, UpdateInfo, UpdateRequest
from rlhf_dist.contracts.tally import Tally, merged
from rlhf_dist.coordinator.experience import Experience
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.data.schedule import assign, minibatch_rows

Rows = tuple[int, ...]
EARLY_STOP = 1.5  # NUMERICS §1: the update ends when k2(new, old) exceeds this times the target


@dataclass
class UpdateReport:
    """What an update did.

    first: metrics of the policy's first minibatch, where law 3 must hold; empty where the policy was not trained on it.
    policy_steps: optimizer steps the policy took (one that was skipped is none).
    faults: of each model, what was not finite in its optimizer steps, in their order; those that fp16 overflow skipped are left out.
    capsules: (model, where it lies or why there is none). unsound: a weight that is not finite.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    policy_steps: int = 0
    stopped_early: bool = False
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    capsules: list[tuple[str, str]] = field(default_factory=list)
    unsound: str = ""


@dataclass
class _Pending:
    group: WorkerGroup
    handles: list[list[Handle]] = field(default_factory=list)
    infos: list[list[UpdateInfo]] = field(default_factory=list)

    def collect(self) -> None:
        for handles in self.handles[len(self.infos) :]:
            self.infos.append(self.group.collect(handles))


class Updater:
    """Trains policy and value on a step's experience.

    Args:
        config: copies what it needs.
        groups: policy, and value if there is one.
        capsule_path: where an optimizer step goes that is skipped, by step, model and number, all from 1; empty: nowhere.
    """

    def __init__(self, config: PPOConfig, groups: Groups, capsule_path: Callable[[int, str, int], str] = lambda *place: "") -> None:
        algorithm = config.algorithm
        self._groups, self._seed, self._capsule_path = groups, config.run.seed, capsule_path
        self._epochs, self._minibatches = algorithm.epochs, algorithm.minibatches
        self._reduction, self._max_new_tokens = algorithm.reduction, config.rollout.max_new_tokens
        self._target_kl = algorithm.target_kl_step
        self._value_warmup = config.value.warmup_steps if groups.value else 0
        self._budgets = {"policy": config.policy.microbatch_tokens, "value": config.value.microbatch_tokens}
        self._packed = {"policy": config.policy.packing, "value": config.value.packing}

    def update(self, step: int, experience: Experience, capsules: Mapping[str, int] | None = None) -> UpdateReport:
        """All epochs of one PPO step. Waits between minibatches only where an early stop may be due.

        An early stop ends the value model's update too: after as many minibatches where it trains at its own turn.
        What a skipped step counted is no metric: it may be NaN.

        Args:
            step: from 0.
            experience: of the step.
            capsules: how many skipped steps of each model may still be written down; None: none.
        """
        trained, report, minibatches = self._trained(step), UpdateReport(), self._plan(step, experience)
        self._step, self._capsules = step, dict(capsules or {})
        for together in [[group] for group in trained] if self._groups.turn.taken else [trained]:
            self._groups.turn(*together, needs="training")
            minibatches = self._train_together(together, minibatches, experience, report)
        report.metrics["policy/stopped_early"] = float(report.stopped_early)
        return report

    def _train_together(
        self, groups: Sequence[WorkerGroup], minibatches: list[Rows], experience: Experience, report: UpdateReport
    ) -> list[Rows]:
        """Trains groups side by side; returns the minibatches that were taken."""
        pending = {group.name: _Pending(group) for group in groups}
        self._load(pending, experience)
        taken = 0
        for rows in minibatches:
            for each in pending.values():
                each.handles.append(self._train(each.group, rows, experience, len(each.handles) + 1))
            taken += 1
            if self._target_kl is not None and "policy" in pending and self._too_far(pending["policy"]):
                report.stopped_early = True
                break
        for each in pending.values():
            each.collect()
            _summarise(each, report)
        return minibatches[:taken]

    @functools.cached_property
    def _costs(self) -> dict[str, FlopModel]:
        """What each trained model costs, as its workers say when the first update asks."""
        asked = {group.name: (group, group.submit(TrainedRole.costs, [()] * group.world_size)) for group in self._groups.trained()}
        return {name: group.collect(handles)[0] for name, (group, handles) in asked.items()}

    def _trained(self, step: int) -> list[WorkerGroup]:
        return [group for group in self._groups.trained() if group is not self._groups.policy or step >= self._value_warmup]

    def _load(self, pending: dict[str, _Pending], experience: Experience) -> None:
        given = (experience.handles, experience.advantages)
        loads = [(each.group, each.group.submit(TrainedRole.load_experience, [given] * each.group.world_size)) for each in pending.values()]
        for group, handles in loads:
            group.collect(handles)

    def _plan(self, step: int, experience: Experience) -> list[Rows]:
        rows = len(experience.lengths)
        epochs = minibatch_rows(rows, self._epochs, min(self._minibatches, rows), self._seed, step)
        return [minibatch for epoch in epochs for minibatch in epoch]

    def _train(self, group: WorkerGroup, rows: Rows, experience: Experience, number: int) -> list[Handle]:
        total = denominator([experience.valid_tokens[row] for row in rows], self._reduction, self._max_new_tokens)
        budget, packed, cost = self._budgets[group.name], self._packed[group.name], self._costs[group.name].in_tokens
        shares = assign(rows, experience.lengths, group.world_size, budget, packed=packed, cost=cost)
        capsule = self._capsule_path(self._step + 1, group.name, number), self._capsules.get(group.name, 0)
        return group.submit(TrainedRole.update, [(UpdateRequest(share, total, *capsule),) for share in shares])

    def _too_far(self, policy: _Pending) -> bool:
        assert self._target_kl is not None
        policy.collect()
        if policy.infos[-1][0].fault:
            return False
        kl = merged(info.tally for info in policy.infos[-1]).means()["policy/approxkl_avg"]
        return kl > EARLY_STOP * self._target_kl


def _summarise(pending: _Pending, report: UpdateReport) -> None:
    """Means over the whole update, by exact merge; rank 0's step reports are global already."""
    name, steps = pending.group.name, [infos[0].step for infos in pending.infos]
    sound = [infos for infos in pending.infos if not infos[0].fault]
    report.metrics |= merged(info.tally for infos in sound for info in infos).means()
    report.metrics |= _step_metrics(name, steps) | {f"lr/{name}": steps[-1].lr}
    if name == "policy":
        report.first = {} if pending.infos[0][0].fault else merged(info.tally for info in pending.infos[0]).means()
        report.policy_steps = sum(not step.skipped for step in steps)
    report.faults[name] = [infos[0].fault for infos in pending.infos if infos[0].fault or not infos[0].step.skipped]
    report.capsules += [(name, infos[0].capsule) for infos in pending.infos if infos[0].capsule]
    unsound = [info.unsound for infos in pending.infos for info in infos if info.unsound]
    report.unsound = report.unsound or (f"{unsound[0]} of the {name}" if unsound else "")


def _step_metrics(name: str, steps: Sequence[StepInfo]) -> dict[str, float]:
    """Gradient norms of the steps that were taken (an overflow has none), and the share that was not."""
    tally = Tally()
    for step in steps:
        tally.add(f"{name}/skipped_steps", float(step.skipped), 1)
        if not step.skipped:
            tally.add(f"{name}/grad_norm", step.grad_norm, 1)
            tally.peak(f"{name}/grad_norm_max", step.grad_norm)
    return tally.means()
