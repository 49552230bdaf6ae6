"""The PPO loop: generate → score → estimate → train → sync → record.

Everything here handles references and one number a sample; tensors stay with the workers (law 7). Under Ray this class lives
in an actor; under the deepspeed launcher, and in one plain process, every rank runs it over groups that look the same.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf_dist.algos.advantages import next_baseline
from rlhf_dist.algos.kl import next_kl_coef
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.roles import PolicyRole
from rlhf_dist.coordinator.checkpoint import checkpoint, export
from rlhf_dist.coordinator.colocation import Turns
from rlhf_dist.coordinator.experience import Coefficients, Experience, estimate
from rlhf_dist.coordinator.held_out import HeldOutRecord, Yardstick, evaluate
from rlhf_dist.coordinator.judging import Judged, judge
from rlhf_dist.coordinator.outcome import StepOutcome
from rlhf_dist.coordinator.pipeline import Pipeline
from rlhf_dist.coordinator.preflight import check_first_minibatch, preflight
from rlhf_dist.coordinator.shards import (
    Batch,
    Groups,
    Shard,
    collect_rollouts,
    collect_scores,
    generate,
    sampling_seconds,
    score_frozen,
    score_trained,
)
from rlhf_dist.coordinator.sync import WeightSync
from rlhf_dist.coordinator.update import Updater
from rlhf_dist.rewards.mixture import RewardMixer
from rlhf_dist.runs.clock import Clock
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.state import RunState
from rlhf_dist.runs.summary import Summary, config_hash

FILTERED = (
    "rollout.top_k and rollout.top_p cut the sampled distribution: the trained ratio is off by the probability they leave, "
    "logged as rollout/kept_mass"
)


class PPOCoordinator:
    """Runs PPO over worker groups.

    Args:
        config: the whole config.
        groups: policy, reward, and reference and value where the config needs them.
        recorder: writes the run folder.
        reporter: shows progress.
    """

    def __init__(self, config: PPOConfig, groups: Groups, recorder: Recorder, reporter: Reporter) -> None:
        if config.placement.offload == "idle":
            groups = dataclasses.replace(groups, turn=Turns(groups.all()))
        self.config, self.groups, self.recorder, self.reporter = config, groups, recorder, reporter
        self.state = RunState(kl_coef=config.algorithm.kl.coef)
        self.mixer = RewardMixer(config.reward, config.rollout.max_new_tokens)
        self.pipeline = Pipeline(config.run.steps, config.rollout.max_staleness)
        self.updater = Updater(config, groups)
        self.sync = WeightSync(config, groups)
        self.synced: dict[str, float] = {}
        self.yardstick = Yardstick(config.reward, config.rollout.max_new_tokens)
        self.held_out = HeldOutRecord()
        self.clock, self.evaluation_clock = Clock(), Clock()
        self.last_kl: float | None = None
        self._sampled = config.algorithm.old_logprobs == "sampler"
        self._held_out_prompts = 0

    def run(self) -> dict[str, Any]:
        """The whole run; returns the summary.

        Raises:
            UserError: a fault that the user can mend, before or during the run.
        """
        began = time.perf_counter()
        self._start()
        for step in range(self.state.step, self.config.run.steps):
            self._step(step)
        return self._finish(time.perf_counter() - began)

    def _step(self, step: int) -> None:
        """One iteration. Under Ray asking does not wait: all engines have their orders while the first shard is still being sampled.

        Where groups take turns (`placement.offload`), each turn begins when the one before is over; otherwise `turn` does nothing.
        """
        clock, moved = Clock(), self.groups.bytes_moved()
        with self._phase(clock, step, "generate"):  # 1. ask for samples: of this step, or of the one max_staleness steps ahead
            fresh = self.pipeline.ask(step, self._generate)
            self.groups.turn()
        with self._phase(clock, step, "score"):  # 2. reference and rewards score a shard once it is there; what learns, at the step's turn
            score_frozen(self.groups, fresh)
            shards = self.pipeline.take(step)
            score_trained(self.groups, shards, with_policy=not self._sampled)
        with self._phase(clock, step, "generate"):
            clock.tokens = collect_rollouts(self.groups.sampler, shards)
            staleness = self.pipeline.staleness(step, shards)
        with self._phase(clock, step, "score"):
            collect_scores(self.groups, shards)
            judged = judge(self.mixer, shards, self.config.rollout.samples_per_prompt, update=True)
        with self._phase(clock, step, "estimate"):  # 3. advantages and returns on the policy workers, moments merged here
            experience = self._estimate(shards, judged)
        with self._phase(clock, step, "train"):  # 4. epochs of minibatches, policy and value side by side, or each at its turn
            report = self.updater.update(step, experience)
            check_first_minibatch(report.first, self.config.policy.dtype, step, sampled=self._sampled)
        with self._phase(clock, step, "sync"):  # 5. the sampler gets the weights of the next version, behind what it was asked for before
            self._sync_weights(step + 1)
        with self._phase(clock, step, "record"):  # 6. every sample to Parquet; then the state moves on, and the step is shown
            self._write_rollouts(step + 1, shards, judged)
        clock.worked["generate"] = sampling_seconds(shards, self.groups.sampler.world_size)
        self._complete(StepOutcome(shards, judged, experience, report, clock, self.groups.bytes_moved() - moved, staleness))

    def _start(self) -> None:
        self.recorder.config(self.config)
        policy, rollout = self.groups.policy, self.config.rollout
        facts = policy.collect(policy.submit(PolicyRole.describe, [()] * policy.world_size))[0]
        self._held_out_prompts = facts["held_out_prompts"]
        self.reporter.started(facts | {group.name: f"{group.world_size} rank(s)" for group in self.groups.all()})
        if rollout.top_k or rollout.top_p < 1:
            self.reporter.message(FILTERED)
        self._sync_weights(0)
        seen = preflight(self.config, self.groups, self.state.policy_version)
        self.reporter.message("preflight passed: " + ", ".join(f"{k.split('/', 1)[1]} {v:.2g}" for k, v in seen.items()))
        for what in self.groups.turn.stays:
            self.reporter.message(f"placement.offload: {what}")
        self.recorder.metrics(0, seen | self.synced | self._evaluate(0) | self.groups.turn.metrics())

    def _generate(self, step: int, version: int) -> list[Shard]:
        """Asks every rank for its shards of a step, this one or a later one, fixed before it begins."""
        rollout = self.config.rollout
        self.groups.turn(self.groups.sampler, needs="sampler")
        start = self.state.prompt_cursor + (step - self.state.step) * rollout.prompts_per_step
        batch = Batch("train", step, start, rollout.prompts_per_step, rollout.samples_per_prompt)
        return generate(self.groups.sampler, batch, version, rollout.shards_per_rank)

    def _estimate(self, shards: Sequence[Shard], judged: Judged) -> Experience:
        """`reinforce` has no running mean yet at step 0: there the mean return of the step itself takes its place."""
        algorithm = self.config.algorithm
        ask = functools.partial(estimate, self.groups.policy, shards, judged, whiten_rewards=algorithm.whiten_rewards)
        experience = ask(Coefficients(self.state.kl_coef, self.state.baseline))
        if algorithm.estimator == "reinforce" and self.state.step == 0:
            experience = ask(Coefficients(self.state.kl_coef, experience.tally.means()["objective/rlhf_reward"]))
        if algorithm.whitens_advantages and experience.advantages.count < 2:
            fix = "sample more or longer completions, or set algorithm.whiten_advantages=false"
            raise UserError(f"whitening needs two tokens at least, the step has {experience.advantages.count}", where="advantages", fix=fix)
        return experience

    def _sync_weights(self, version: int) -> None:
        if self.groups.rollout is not None:  # with one deadline for each step that was asked for, and before the policy stands in a gather
            for shards in self.pipeline.pending.values():
                collect_rollouts(self.groups.rollout, shards)
        self.groups.turn(self.groups.policy, self.groups.sampler, needs="sync")
        self.synced = self.sync(version)
        self.state.policy_version = version

    def _write_rollouts(self, done: int, shards: Sequence[Shard], judged: Judged) -> None:
        details = [judged.of(shards, index).details() for index in range(len(shards))]
        given = (self.recorder.rollouts_path(done), [s.rollouts for s in shards], [s.pieces for s in shards], details)
        policy = self.groups.policy
        policy.collect(policy.submit(PolicyRole.write_rollouts, [given] * policy.world_size))

    def _complete(self, outcome: StepOutcome) -> None:
        """Advances the state, evaluates and saves when it is time, and shows the step."""
        metrics = outcome.metrics() | self.synced | {"objective/kl_coef": self.state.kl_coef}
        self._advance(outcome)
        done, total = self.state.step, self.config.run.steps
        self.clock.add(outcome.clock)
        samples = self.state.prompt_cursor * self.config.rollout.samples_per_prompt
        metrics |= {"episode": float(samples), "policy/version": float(self.state.policy_version)}
        if done == total or _due(done, self.config.evaluation.every):
            metrics |= self._evaluate(done)
        metrics |= self.groups.turn.metrics()
        self.recorder.metrics(done, metrics)
        if _due(done, self.config.checkpoint.every):
            checkpoint(self.groups, self.recorder, self.state, self.config.checkpoint.keep)
        self.reporter.step(done, total, metrics)

    def _advance(self, outcome: StepOutcome) -> None:
        """Moves the one state object on. All figures are over all ranks."""
        state, algorithm = self.state, self.config.algorithm
        self.last_kl = outcome.kl
        if algorithm.kl.adaptive:
            state.kl_coef = next_kl_coef(state.kl_coef, outcome.kl, outcome.episodes, algorithm.kl.target, algorithm.kl.horizon)
        state.baseline = next_baseline(None if state.step == 0 else state.baseline, outcome.mean_return, algorithm.baseline_momentum)
        state.step += 1
        state.prompt_cursor += self.config.rollout.prompts_per_step
        state.optimizer_steps += outcome.report.policy_steps
        state.reward_mixer = dict(self.mixer.state_dict())
        state.count_dropped("every reward abstained", outcome.dropped)
        state.count_dropped("prompt longer than data.max_prompt_tokens", outcome.dropped_prompts)

    def _evaluate(self, step: int) -> dict[str, float]:
        if not self._held_out_prompts:
            return {}
        batch = Batch("eval", step, 0, self._held_out_prompts, self.config.evaluation.samples_per_prompt)
        with self._phase(self.evaluation_clock, step, "evaluate"):
            samples = evaluate(self.groups, self.yardstick, batch, self.state.policy_version, self.recorder.evaluation_path(step))
        self.evaluation_clock.tokens += sum(samples.lengths)
        result = self.held_out.add(samples)
        self.state.record_evaluation(result.score.mean, step)
        return result.metrics()

    def _finish(self, seconds: float) -> dict[str, Any]:
        export(self.groups, self.recorder.export_path)
        summary = Summary(
            name=self.config.run.name,
            seed=self.config.run.seed,
            config_sha256=config_hash(dump_config(self.config)),
            steps=self.state.step,
            optimizer_steps=self.state.optimizer_steps,
            wall_seconds=seconds,
            kl=self.last_kl,
            held_out=self.held_out.summary(self.state.best_score, self.state.best_step),
            tokens_per_second=self.clock.throughput() | self.evaluation_clock.throughput(),
            seconds=self.clock.seconds | self.evaluation_clock.seconds,
            dropped=self.state.dropped,
        ).to_dict()
        self.recorder.summary(summary)
        self.recorder.close()
        self.reporter.finished(summary)
        return summary

    @contextmanager
    def _phase(self, clock: Clock, step: int, name: str) -> Iterator[None]:
        self.reporter.phase(step, name)
        with clock.phase(name):
            yield


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
