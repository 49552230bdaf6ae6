"""The PPO loop: generate → score → estimate → update → sync → record.

Everything here handles references and one number a sample; tensors stay with the workers (law 7). Under Ray this class lives
in an actor; under the deepspeed launcher, and in one plain process, every rank runs it over groups that look the same.
"""

from __future__ import annotations

import time
from typing import Any

from rlhf_dist.algos.advantages import next_baseline
from rlhf_dist.algos.kl import next_kl_coef
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.roles import PolicyRole, TrainedRole
from rlhf_dist.contracts.tally import merged
from rlhf_dist.coordinator.clock import Clock
from rlhf_dist.coordinator.experience import Coefficients, Experience, estimate
from rlhf_dist.coordinator.held_out import evaluate
from rlhf_dist.coordinator.judging import Judged, judge
from rlhf_dist.coordinator.preflight import check_first_minibatch, preflight
from rlhf_dist.coordinator.recorder import Recorder
from rlhf_dist.coordinator.shards import Batch, Groups, Shard, collect_rollouts, collect_scores, generate, score
from rlhf_dist.coordinator.update import Updater, UpdateReport
from rlhf_dist.evaluation.held_out import EvaluationResult
from rlhf_dist.rewards.mixture import RewardMixer
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.state import RunState
from rlhf_dist.runs.summary import HeldOut, Summary, config_hash


class PPOCoordinator:
    """Runs PPO over worker groups.

    Args:
        config: the whole config.
        groups: policy, reward, and reference and value where the config needs them.
        recorder: writes the run folder.
        reporter: shows progress.
    """

    def __init__(self, config: PPOConfig, groups: Groups, recorder: Recorder, reporter: Reporter) -> None:
        self.config, self.groups, self.recorder, self.reporter = config, groups, recorder, reporter
        self.state = RunState(kl_coef=config.algorithm.kl.coef)
        self.mixer = RewardMixer(config.reward, config.rollout.max_new_tokens)
        self.updater = Updater(config, groups)
        self.clock = Clock()
        self.evaluations: dict[int, EvaluationResult] = {}
        self.last_kl: float | None = None
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
        clock, sent = Clock(), self._bytes()
        with clock.phase("generate"):  # 1. sample; scoring of early shards begins meanwhile
            shards = self._generate(step)
        with clock.phase("score"):  # 2. old log-probs, reference, values, rewards
            collect_scores(self.groups, shards)
            judged = judge(self.mixer, shards, self.config.rollout.samples_per_prompt, update=True)
        with clock.phase("estimate"):  # 3. advantages and returns
            experience = self._estimate(shards, judged)
        with clock.phase("train"):  # 4. epochs of minibatches, policy and value side by side
            report = self.updater.update(step, experience)
            if report.first:
                check_first_minibatch(report.first, self.config.policy.dtype, step)
        with clock.phase("sync"):  # 5. the sampler gets the new weights
            self._sync(self.state.policy_version + (report.policy_steps > 0))
        with clock.phase("record"):  # 6. rollouts, metrics, evaluation, checkpoint
            self._write_rollouts(step, shards, judged)
        clock.tokens = sum(n for shard in shards if shard.info for n in shard.info.response_lengths)
        self._advance(step, judged, experience, report)
        self._record(step, clock, (self._bytes() - sent) / len(judged.scores), [judged, experience, report])

    def _start(self) -> None:
        self.recorder.config(self.config)
        facts = self.groups.policy.collect(self.groups.policy.submit(PolicyRole.describe, [()] * self.groups.policy.world_size))[0]
        self._held_out_prompts = facts["held_out_prompts"]
        self.reporter.started(facts | {group.name: f"{group.world_size} rank(s)" for group in self.groups.all()})
        self._sync(0)
        seen = preflight(self.config, self.groups, self.state.policy_version)
        self.reporter.message("preflight passed: " + ", ".join(f"{k.split('/', 1)[1]} {v:.2g}" for k, v in seen.items()))
        self.recorder.metrics(0, seen | self._evaluate(0))

    def _generate(self, step: int) -> list[Shard]:
        self.reporter.phase(step, "generate")
        rollout = self.config.rollout
        batch = Batch("train", step, self.state.prompt_cursor, rollout.prompts_per_step, rollout.samples_per_prompt)
        shards = generate(self.groups.policy, batch, self.state.policy_version, rollout.shards_per_rank)
        score(self.groups, shards, with_value=True)
        collect_rollouts(self.groups.policy, shards)
        self.reporter.phase(step, "score")
        return shards

    def _estimate(self, shards: list[Shard], judged: Judged) -> Experience:
        kept = [score for score, keep in zip(judged.scores, judged.keep, strict=True) if keep]
        baseline = sum(kept) / len(kept) if self.state.step == 0 else self.state.baseline
        coefficients = Coefficients(self.state.kl_coef, baseline)
        experience = estimate(self.groups.policy, shards, judged, coefficients, whiten_rewards=self.config.algorithm.whiten_rewards)
        self.reporter.phase(self.state.step, "train")
        return experience

    def _sync(self, version: int) -> None:
        sums = self.groups.policy.collect(self.groups.policy.submit(PolicyRole.sync_weights, [(version,)] * self.groups.policy.world_size))
        if len(set(sums)) != 1:
            raise UserError(
                f"after the sync to version {version} the ranks hold different weights (checksums {sorted(set(sums))})",
                where="policy, weight sync",
                fix="the ranks have drifted apart: report this with the config; do not use the weights",
            )
        self.state.policy_version = version

    def _write_rollouts(self, step: int, shards: list[Shard], judged: Judged) -> None:
        details = [judged.of(shards, index).details() for index in range(len(shards))]
        given = (self.recorder.rollouts_path(step + 1), [s.rollouts for s in shards], [s.pieces for s in shards], details)
        policy = self.groups.policy
        policy.collect(policy.submit(PolicyRole.write_rollouts, [given] * policy.world_size))

    def _advance(self, step: int, judged: Judged, experience: Experience, report: UpdateReport) -> None:
        """Moves the one state object on."""
        state, algorithm, episodes = self.state, self.config.algorithm, len(experience.kl)
        self.last_kl = sum(experience.kl) / episodes
        mean_return = experience.tally.means()["objective/rlhf_reward"]
        state.baseline = next_baseline(None if state.step == 0 else state.baseline, mean_return, algorithm.baseline_momentum)
        self._used_kl_coef = state.kl_coef
        if algorithm.kl.adaptive:
            state.kl_coef = next_kl_coef(state.kl_coef, self.last_kl, episodes, algorithm.kl.target, algorithm.kl.horizon)
        state.step = step + 1
        state.prompt_cursor += self.config.rollout.prompts_per_step
        state.optimizer_steps += report.policy_steps
        state.reward_mixer = dict(self.mixer.state_dict())
        state.count_dropped("every reward abstained", len(judged.keep) - sum(judged.keep))

    def _record(self, step: int, clock: Clock, bytes_per_sample: float, parts: list[Any]) -> None:
        judged, experience, report = parts
        self.clock.add(clock)
        metrics = merged([judged.tally, experience.tally]).means() | report.metrics | clock.metrics()
        metrics |= {"objective/kl_coef": self._used_kl_coef, "coordinator/bytes_per_sample": bytes_per_sample}
        metrics |= {"episode": float(self.state.prompt_cursor * self.config.rollout.samples_per_prompt), "policy/version": float(self.state.policy_version)}
        done = step + 1
        every = self.config.evaluation.every
        if (every and done % every == 0) or done == self.config.run.steps:
            metrics |= self._evaluate(done)
        self.recorder.metrics(done, metrics)
        if self.config.checkpoint.every and done % self.config.checkpoint.every == 0:
            self._checkpoint()
        self.reporter.step(done, self.config.run.steps, metrics)

    def _evaluate(self, step: int) -> dict[str, float]:
        if not self._held_out_prompts:
            return {}
        self.reporter.phase(step, "evaluate")
        batch = Batch("eval", step, 0, self._held_out_prompts, self.config.evaluation.samples_per_prompt)
        with self.clock.phase("evaluate"):
            result = evaluate(self.groups, self.mixer, batch, self.state.policy_version, self.recorder.evaluation_path(step))
        self.evaluations[step] = result
        self.state.record_evaluation(result.score.mean, step)
        return result.metrics()

    def _checkpoint(self) -> None:
        folder = self.recorder.begin_checkpoint(self.state.step)
        self._export({group.name: f"{folder}/{group.name}" for group in self._trained()})
        self.recorder.publish_checkpoint(self.state, self.config.checkpoint.keep)

    def _trained(self) -> list[Any]:
        return [group for group in (self.groups.policy, self.groups.value) if group is not None]

    def _export(self, folders: dict[str, str]) -> None:
        asked = [(group, group.submit(TrainedRole.export, [(folders[group.name],)] * group.world_size)) for group in self._trained()]
        for group, handles in asked:
            group.collect(handles)

    def _finish(self, seconds: float) -> dict[str, Any]:
        self._export({group.name: self.recorder.export_path(group.name) for group in self._trained()})
        summary = Summary(
            name=self.config.run.name,
            seed=self.config.run.seed,
            config_sha256=config_hash(dump_config(self.config)),
            steps=self.state.step,
            optimizer_steps=self.state.optimizer_steps,
            wall_seconds=seconds,
            kl=self.last_kl,
            held_out=self._held_out(),
            tokens_per_second=self.clock.throughput(),
            seconds=self.clock.seconds,
            dropped=self.state.dropped,
        ).to_dict()
        self.recorder.summary(summary)
        self.recorder.close()
        self.reporter.finished(summary)
        return summary

    def _held_out(self) -> HeldOut | None:
        if not self.evaluations:
            return None
        first, last = min(self.evaluations), max(self.evaluations)
        before, after = self.evaluations[first].to_dict(), self.evaluations[last].to_dict()
        return HeldOut(before, after, None, self.state.best_score, self.state.best_step)

    def _bytes(self) -> int:
        return sum(getattr(group, "bytes_sent", 0) + getattr(group, "bytes_received", 0) for group in self.groups.all())
