"""The life of a PPO run around its loop: what it stands on, how it is saved and taken up again, and how it survives its processes."""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.group import Lost, SupervisedGroup, WorkerGroup
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.coordinator.checkpoint import Checkpointer
from rlhf_dist.coordinator.colocation import Turns
from rlhf_dist.coordinator.experience import Experience
from rlhf_dist.coordinator.held_out import HeldOutRecord, Yardstick
from rlhf_dist.coordinator.judging import Judged
from rlhf_dist.coordinator.pipeline import Pipeline
from rlhf_dist.coordinator.recovery import dead, forget_lost, lost_rollouts
from rlhf_dist.coordinator.sentinels import Sentinels
from rlhf_dist.coordinator.shards import Groups, Shard, score_frozen
from rlhf_dist.coordinator.sync import WeightSync
from rlhf_dist.coordinator.update import UpdateReport
from rlhf_dist.rewards.mixture import RewardMixer
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.clock import Clock
from rlhf_dist.runs.lineage import WEIGHT_KEYS, changed_keys
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.state import RunState
from rlhf_dist.runs.supervision import Budget, rebuild, stuck_report


@dataclass
class Work:
    """A step under way: what is done of it is not done again after a recovery.

    moved: bytes that had passed through the coordinator before it. report: of the update, which is there once it is over.
    """

    step: int
    moved: int
    clock: Clock = field(default_factory=Clock)
    staleness: Tally = field(default_factory=Tally)
    judged: Judged | None = None
    experience: Experience | None = None
    report: UpdateReport | None = None


class Stopped(Exception):
    """The run was asked to end early, and stands where it can."""


class Lifecycle(ABC):
    """What a PPO run is between and beside its steps. The loop itself is `coordinator.ppo.PPOCoordinator`, which see for the arguments."""

    def __init__(
        self,
        config: PPOConfig,
        groups: Groups,
        recorder: Recorder,
        reporter: Reporter,
        resume: Checkpoint | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        if config.placement.offload == "idle":
            groups = dataclasses.replace(groups, turn=Turns(groups.all()))
        self.config, self.groups, self.recorder, self.reporter = config, groups, recorder, reporter
        self.checkpointer = Checkpointer(config.checkpoint, groups, recorder)
        self.budget = Budget(config.placement.restarts)
        self._stopping, self._resume = stopping, resume
        self._phase_name, self._recoveries = "start", 0
        self._began = time.perf_counter()
        self._fresh(RunState())

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """Introduces itself to groups that may be new; returns facts about them."""

    @abstractmethod
    def _generate(self, step: int, version: int) -> list[Shard]:
        """Asks for the samples of a step."""

    @abstractmethod
    def _sync_weights(self, version: int) -> None:
        """Gives whoever samples the policy's weights."""

    def _save(self) -> None:
        state = self.state
        state.held_out, state.yardstick = self.held_out.state_dict(), self.yardstick.state_dict()
        state.sentinels = self.sentinels.state_dict()
        state.seconds = {"wall": {"run": self._wall_seconds()}}
        for name, clock in (("train", self.clock), ("evaluate", self.evaluation_clock)):
            state.seconds |= {name: dict(clock.seconds), f"{name}, worked": dict(clock.worked)}
            state.tokens[name] = clock.tokens
        self.checkpointer.save(state, self.pipeline)

    def _stop_if_asked(self) -> None:
        if self._stopping():
            raise Stopped

    def _stop(self) -> dict[str, Any]:
        """Ends early, at a place where policy and value are those of a whole number of steps."""
        self._phase_name = "save"
        self._save()
        self.checkpointer.finish()
        self.recorder.close()
        return {"stopped": self.state.step}

    def _watched(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a step, with those of the sentinels, which speak up here. One that is not finite is left out, and counted."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for warning in self.sentinels.watch(finite):
            self.reporter.message(warning)
        left_out = sorted(metrics.keys() - finite.keys())
        if left_out:
            self.reporter.message(f"warning: not finite, and left out of the metrics of step {self.state.step}: {', '.join(left_out)}")
        return finite | self.sentinels.metrics() | {"sentinels/non_finite_metrics": float(len(left_out))}

    def _stop_if_spent(self) -> None:
        """Ends a run that skips and skips.

        Raises:
            UserError: it does; the state is saved.
        """
        spent = self.sentinels.spent(self.state.step)
        if spent is not None:
            self._stop()
            raise spent

    def _unsound(self, step: int, weight: str) -> UserError:
        """Weights that are not finite: nothing of them is kept."""
        self.checkpointer.finish()
        newest = self.recorder.newest_checkpoint(self.reporter.message)
        again = "nothing was saved yet: begin anew with a lower learning rate"
        if newest is not None:
            again = f"{newest.folder} is whole: begin anew with a lower learning rate, or go on from it with run.resume=auto"
        return UserError(f"the weight {weight} is not finite after an optimizer step", where=f"step {step}, train", fix=again)

    def _fresh(self, state: RunState) -> None:
        """The coordinator's own part of a run that stands before step `state.step`."""
        config = self.config
        self.state = state
        self._work: Work | None = None
        self._training = self._started = False
        self.mixer = RewardMixer(config.reward, config.rollout.max_new_tokens)
        self.yardstick = Yardstick(config.reward, config.rollout.max_new_tokens)
        self.held_out = HeldOutRecord()
        self.sentinels = Sentinels(config.sentinels, state.sentinels)
        seconds, tokens = state.seconds, state.tokens
        self.clock, self.evaluation_clock = (
            Clock(dict(seconds.get(name, {})), tokens.get(name, 0), dict(seconds.get(f"{name}, worked", {})))
            for name in ("train", "evaluate")
        )
        self._wall_before = seconds.get("wall", {}).get("run", 0.0)
        if state.reward_mixer:  # a state that was saved
            self.held_out.load_state_dict(state.held_out)
            self.yardstick.load_state_dict(state.yardstick)
        else:
            state.kl_coef, state.reward_mixer = config.algorithm.kl.coef, dict(self.mixer.state_dict())
        self.mixer.load_state_dict(state.reward_mixer)
        self.pipeline = Pipeline(config.run.steps, config.rollout.max_staleness)
        self.sync = WeightSync(config, self.groups)
        self.synced: dict[str, float] = {}

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Everything as it was when the checkpoint was taken.

        Raises:
            UserError: the engines then hold other weights than the sampler had: the base model is another.
        """
        began = time.perf_counter()
        self._fresh(RunState.from_dict(checkpoint.state))
        if warning := self.recorder.rewind(self.state.step, self.state.metrics_bytes):
            self.reporter.message(warning)
        self.checkpointer.restore(checkpoint, self.state, self.pipeline)
        saved = self.state.weights
        self._sync_weights(self.state.policy_version)
        if self.state.weights != saved and not any(key.startswith(WEIGHT_KEYS) for key in changed_keys(checkpoint.folder, self.config)):
            fix = "put the base model back as it was when the run began"
            what = f"the restored policy's weights have the checksum {self.state.weights}, those that were saved had {saved}"
            raise UserError(what, where=str(checkpoint.folder), fix=fix)
        seconds = time.perf_counter() - began
        self.reporter.message(f"resumed after step {self.state.step} from {checkpoint.folder} ({seconds:.1f} s)")

    def _look_after_rollouts(self) -> None:
        """Looks whether the rollout group is there, while a new one can still be given the weights it needs without going back.

        Raises:
            Lost: it is not.
        """
        rollout = self.groups.rollout
        if isinstance(rollout, SupervisedGroup) and not rollout.alive():
            raise Lost("a worker process of rollout is gone", where="rollout", fix="look for the cause in the logs")

    def _recover(self, lost: Lost) -> None:
        """Brings the run back to where it can go on.

        Raises:
            UserError: too many recoveries without getting further; the state is saved where that is possible.
        """
        suspects: list[WorkerGroup] = []  # also those that were started anew in vain: what they held is gone
        while True:
            where, began = f"step {self.state.step + 1}, phase {self._phase_name}", time.perf_counter()
            suspects += [group for group in self._suspects(lost) if group not in suspects]
            try:
                self._charge(lost, suspects)
                self._recoveries += 1
                self.reporter.message(f"recovering in {where}: {lost.what} ({lost.where})")
                how = self._bring_back(suspects)
                self.reporter.message(f"recovered in {time.perf_counter() - began:.1f} s: {how}")
                return
            except Lost as again:
                lost = again

    def _suspects(self, lost: Lost) -> list[WorkerGroup]:
        """The groups that are to be started anew; of stuck ones a report is written."""
        found = dead(self.groups)
        if lost.late:
            step = self.state.step
            text, stuck = stuck_report(lost, self.groups.all(), f"step {step + 1}, phase {self._phase_name}")
            path = self.recorder.stuck(f"stuck_step_{step + 1:06d}", text)
            self.reporter.message(f"stuck: what every process is at stands in {path}")
            if self._phase_name == "sync" and self.groups.rollout is not None:  # the two sides no longer agree on which bucket is next
                stuck.append(self.groups.rollout)
            found += [group for group in stuck if group not in found]
        return found

    def _charge(self, lost: Lost, suspects: Sequence[WorkerGroup]) -> None:
        try:
            self.budget.charge(self.state.step, lost)
        except UserError as spent:
            trained_are_well = not any(group in suspects for group in self.groups.trained())
            if self._started and not self._training and (self._work is None or self._work.report is None) and trained_are_well:
                self._save_at_last()
            raise spent from None

    def _save_at_last(self) -> None:
        """Saves where that is possible: what is pending may be gone with the process that is missed, or a further one may die."""
        try:
            self._stop()
        except Lost as again:
            self.reporter.message(f"the state after step {self.state.step} could not be saved, the last checkpoint stands: {again.what}")
        else:
            self.reporter.message(f"the state after step {self.state.step} is saved")

    def _bring_back(self, suspects: Sequence[WorkerGroup]) -> str:
        """Rebuilds what is gone, and nothing else if that is enough; says what was done."""
        groups, trained = self.groups, self.groups.trained()
        sending = self._phase_name == "sync" and groups.rollout in suspects  # the policy still waits for the dead to take its weights
        if not self._started or self._training or sending or any(group in suspects for group in trained):
            return self._roll_back(suspects)
        rebuild(suspects)
        groups.turn.forget()
        weights = self.state.step + (self._work is not None and self._work.report is not None)
        gone = lost_rollouts(groups.sampler, self.pipeline)
        if any(self.pipeline.version(step) != weights for step in gone):  # the policy that made them is no more
            return self._roll_back([])
        if groups.rollout in suspects:
            self.sync = WeightSync(self.config, groups)
            self.pipeline.pending |= {step: [] for step in gone}  # and gone they stay, should this fail
            self._phase_name = "sync"  # so that a death in it is known for one that the policy waits for
            self._sync_weights(weights)
        if groups.reward in suspects:
            self._describe()
        for step in gone:
            self.pipeline.pending[step] = self._generate(step, weights)
        again = forget_lost(groups, self.pipeline.shards())
        score_frozen(groups, self.pipeline.shards())
        names = ", ".join(group.name for group in suspects) or "nothing"
        return f"rebuilt {names}; sampled {len(gone)} steps again, asked {again} times again"

    def _roll_back(self, suspects: Sequence[WorkerGroup]) -> str:
        """Policy, value and what samples for them go back to the last committed checkpoint, or to the beginning."""
        groups, self._started = self.groups, False  # first of all: if this fails, nothing less than this will do
        again = [group for group in groups.all() if group in suspects or group in (*groups.trained(), groups.rollout)]
        rebuild(again)
        self.checkpointer.abandon()  # now nobody writes any more
        groups.turn.forget()
        self._resume = self.recorder.newest_checkpoint(self.reporter.message)
        self._fresh(RunState())  # `_start` takes up what the checkpoint holds
        back = "the beginning" if self._resume is None else f"step {self._resume.step}"
        return f"rebuilt {', '.join(group.name for group in again)}, back to {back}"

    def _wall_seconds(self) -> float:
        return self._wall_before + time.perf_counter() - self._began

    @contextmanager
    def _phase(self, clock: Clock, step: int, name: str) -> Iterator[None]:
        self._phase_name = name
        self.reporter.phase(step, name)
        with clock.phase(name):
            yield
