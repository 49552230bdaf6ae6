"""The PPO loop: generate → score → estimate → train → sync → record.

Everything here handles references and one number a sample; tensors stay with the workers (law 7). Under Ray this class lives
in an actor; under the deepspeed launcher, and in one plain process, every rank runs it over groups that look the same.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_dist.algos.advantages import next_baseline
from rlhf_dist.algos.kl import next_kl_coef
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.group import Lost
from rlhf_dist.contracts.roles import PolicyRole, RewardRole
from rlhf_dist.coordinator.checkpoint import export
from rlhf_dist.coordinator.experience import Coefficients, Experience, estimate
from rlhf_dist.coordinator.held_out import evaluate
from rlhf_dist.coordinator.judging import Judged, judge
from rlhf_dist.coordinator.lifecycle import Lifecycle, Stopped, Work
from rlhf_dist.coordinator.outcome import StepOutcome
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
from rlhf_dist.coordinator.update import Updater, UpdateReport
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.summary import Summary, config_hash

FILTERED = (
    "rollout.top_k and rollout.top_p cut the sampled distribution: the trained ratio is off by the probability they leave, "
    "logged as rollout/kept_mass"
)


class PPOCoordinator(Lifecycle):
    """Runs PPO over worker groups.

    Args:
        config: the whole config.
        groups: policy, reward, and reference and value where the config needs them.
        recorder: writes the run folder.
        reporter: shows progress.
        resume: the checkpoint to go on from; None to begin.
        stopping: whether the run is asked to end early, with its state saved. The same answer on every rank that runs a coordinator.
    """

    def __init__(
        self,
        config: PPOConfig,
        groups: Groups,
        recorder: Recorder,
        reporter: Reporter,
        resume: Checkpoint | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(config, groups, recorder, reporter, resume, stopping)
        self.updater = Updater(config, self.groups, recorder.capsule_path)
        self._sampled = config.algorithm.old_logprobs == "sampler"
        self._held_out_prompts = 0

    def run(self) -> dict[str, Any]:
        """The whole run; returns the summary, or `{"stopped": step}` where it was asked to end early.

        Raises:
            UserError: a fault that the user can mend, before or during the run.
        """
        self._began = time.perf_counter()
        while True:
            try:
                return self._go_on()
            except Lost as lost:
                self._recover(lost)

    def _go_on(self) -> dict[str, Any]:
        """From where the run stands to its end."""
        try:
            self._start()
            while self.state.step < self.config.run.steps:
                self._step(self.state.step)
        except Stopped:
            return self._stop()
        return self._finish()

    def _step(self, step: int) -> None:
        """One iteration. Under Ray asking does not wait: all engines have their orders while the first shard is still being sampled.

        Where groups take turns (`placement.offload`), each turn begins when the one before is over; otherwise `turn` does nothing.
        After a recovery the same step is called again: what `work` holds is not done twice.
        """
        if self._work is None:
            self._stop_if_asked()
            self._work = Work(step, self.groups.bytes_moved())
        work, clock = self._work, self._work.clock
        if work.report is None:
            self._make_experience(step, work)  # 1. to 3.
            self._stop_if_asked()
            self._look_after_rollouts()
            with self._phase(clock, step, "train"):  # 4. epochs of minibatches, policy and value side by side, or each at its turn
                work.report = self._train(step, work)
        self._look_after_rollouts()
        with self._phase(clock, step, "sync"):  # 5. the sampler gets the weights of the next version, behind what it was asked for before
            self._sync_weights(step + 1)
        with self._phase(clock, step, "record"):  # 6. every sample to Parquet; then the state moves on, and the step is shown
            outcome = self._outcome(step, work)
            self._write_rollouts(step + 1, outcome.shards, outcome.judged)
        self._complete(step, outcome)

    def _make_experience(self, step: int, work: Work) -> None:
        clock, pipeline = work.clock, self.pipeline
        with self._phase(clock, step, "generate"):  # 1. ask for samples: of this step, or of the one max_staleness steps ahead
            pipeline.ask(step, self._generate)
            self.groups.turn()
        with self._phase(clock, step, "score"):  # 2. reference and rewards score a shard once it is there; what learns, at the step's turn
            score_frozen(self.groups, pipeline.shards())
            shards = pipeline.pending[step]
            score_trained(self.groups, shards, with_policy=not self._sampled)
        with self._phase(clock, step, "generate"):
            clock.tokens = collect_rollouts(self.groups.sampler, shards)
            work.staleness = pipeline.staleness(step, shards)
        with self._phase(clock, step, "score"):
            collect_scores(self.groups, shards)
            self.mixer.load_state_dict(self.state.reward_mixer)  # a step that is judged again counts its rewards once
            work.judged = judge(self.mixer, shards, self.config.rollout.samples_per_prompt, update=True)
        with self._phase(clock, step, "estimate"):  # 3. advantages and returns on the policy workers, moments merged here
            work.experience = self._estimate(shards, work.judged)

    def _train(self, step: int, work: Work) -> UpdateReport:
        """Between its first and its last optimizer step, policy and value are of no version: whoever dies then, both go back."""
        assert work.experience is not None
        self._training = True
        report = self.updater.update(step, work.experience, self.sentinels.capsules_left())
        for said in self.sentinels.note(step + 1, report):
            self.reporter.message(said)
        if report.unsound:
            raise self._unsound(step + 1, report.unsound)
        check_first_minibatch(report.first, self.config.policy.dtype, step, sampled=self._sampled)
        self._training = False
        return report

    def _start(self) -> None:
        """Before the first step: the facts, the weights of the first version, preflight, the first evaluation. Once."""
        if self._started:
            return
        self._phase_name = "start"
        self.recorder.config(self.config, self._resume.folder if self._resume else None)
        facts = self._describe()
        if not self._recoveries:
            self.reporter.started(facts)
        if self._resume is not None:
            self._restore(self._resume)
        else:
            self.recorder.rewind(-1, 0)
            self._sync_weights(0)
        seen = preflight(self.config, self.groups, self.state.policy_version)
        self.reporter.message("preflight passed: " + ", ".join(f"{k.split('/', 1)[1]} {v:.2g}" for k, v in seen.items()))
        for what in self.groups.turn.stays:
            self.reporter.message(f"placement.offload: {what}")
        if self._resume is None:
            self.recorder.metrics(0, seen | self.synced | self._evaluate(0) | self.groups.turn.metrics())
        self._started = True

    def _describe(self) -> dict[str, Any]:
        policy, reward, rollout = self.groups.policy, self.groups.reward, self.config.rollout
        reward.collect(reward.submit(RewardRole.quarantine_to, [(self.recorder.quarantine_path(),)] * reward.world_size))
        facts = policy.collect(policy.submit(PolicyRole.describe, [()] * policy.world_size))[0]
        self._held_out_prompts = facts["held_out_prompts"]
        if rollout.top_k or rollout.top_p < 1:
            self.reporter.message(FILTERED)
        return facts | {group.name: f"{group.world_size} rank(s)" for group in self.groups.all()}

    def _generate(self, step: int, version: int) -> list[Shard]:
        """Asks every rank for its shards of a step, this one or a later one, fixed before it begins."""
        rollout = self.config.rollout
        self.groups.turn(self.groups.sampler, needs="sampler")
        start = step * rollout.prompts_per_step
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
        self.state.policy_version, self.state.weights = version, int(self.synced["weight_sync/checksum"])

    def _write_rollouts(self, done: int, shards: Sequence[Shard], judged: Judged) -> None:
        details = [judged.of(shards, index).details() for index in range(len(shards))]
        given = (self.recorder.rollouts_path(done), [s.rollouts for s in shards], [s.pieces for s in shards], details)
        policy = self.groups.policy
        policy.collect(policy.submit(PolicyRole.write_rollouts, [given] * policy.world_size))

    def _outcome(self, step: int, work: Work) -> StepOutcome:
        shards = self.pipeline.pending[step]
        assert work.judged is not None and work.experience is not None and work.report is not None
        work.clock.worked["generate"] = sampling_seconds(shards, self.groups.sampler.world_size)
        moved = self.groups.bytes_moved() - work.moved
        return StepOutcome(shards, work.judged, work.experience, work.report, work.clock, moved, work.staleness)

    def _complete(self, step: int, outcome: StepOutcome) -> None:
        """Evaluates when it is time, advances the state, shows the step, and saves when it is time."""
        done, total = step + 1, self.config.run.steps
        evaluated = self._evaluate(done) if done == total or _due(done, self.config.evaluation.every) else {}
        metrics = outcome.metrics() | self.synced | {"objective/kl_coef": self.state.kl_coef}
        self._advance(outcome)
        samples = self.state.prompt_cursor * self.config.rollout.samples_per_prompt
        metrics |= {"episode": float(samples), "policy/version": float(self.state.policy_version)} | evaluated
        metrics |= self.groups.turn.metrics() | self.checkpointer.metrics() | {"coordinator/recoveries": float(self._recoveries)}
        metrics = self._watched(metrics)
        self.pipeline.done(step)
        self._work = None
        self.recorder.metrics(done, metrics)
        self.reporter.step(done, total, metrics)
        self.checkpointer.poll()
        self._stop_if_spent()
        if _due(done, self.config.checkpoint.every) and done < total:
            self._save()

    def _advance(self, outcome: StepOutcome) -> None:
        """Moves the one state object on. All figures are over all ranks."""
        state, algorithm = self.state, self.config.algorithm
        if math.isfinite(outcome.kl) and math.isfinite(outcome.mean_return):  # log-probs that are not finite make every step a skipped one
            state.kl = outcome.kl
            if algorithm.kl.adaptive:
                state.kl_coef = next_kl_coef(state.kl_coef, outcome.kl, outcome.episodes, algorithm.kl.target, algorithm.kl.horizon)
            before = None if state.step == 0 else state.baseline
            state.baseline = next_baseline(before, outcome.mean_return, algorithm.baseline_momentum)
        state.step += 1
        state.prompt_cursor += self.config.rollout.prompts_per_step
        state.optimizer_steps += outcome.report.policy_steps
        state.reward_mixer = dict(self.mixer.state_dict())
        failed = outcome.judged.dropped_by_failure
        state.count_dropped("a reward failed", failed)
        state.count_dropped("every reward abstained", outcome.dropped - failed)
        state.count_dropped("prompt longer than data.max_prompt_tokens", outcome.dropped_prompts)
        self.clock.add(outcome.clock)

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

    def _finish(self) -> dict[str, Any]:
        self._phase_name = "export"
        export(self.groups, self.recorder.export_path)
        self.checkpointer.finish()
        summary = Summary(
            name=self.config.run.name,
            seed=self.config.run.seed,
            config_sha256=config_hash(dump_config(self.config)),
            steps=self.state.step,
            optimizer_steps=self.state.optimizer_steps,
            wall_seconds=self._wall_seconds(),
            kl=self.state.kl,
            held_out=self.held_out.summary(self.state.best_score, self.state.best_step),
            tokens_per_second=self.clock.throughput() | self.evaluation_clock.throughput(),
            seconds=self.clock.seconds | self.evaluation_clock.seconds,
            dropped=self.state.dropped,
        ).to_dict()
        self.recorder.summary(summary)
        self.recorder.close()
        self.reporter.finished(summary)
        return summary


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
