"""The loop of the supervised stages: epochs of minibatches, evaluation, the best model kept.

Like the PPO coordinator it handles row numbers and metrics only; rows and tensors stay with the workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config
from rlhf_dist.config.supervised import TrainingSection
from rlhf_dist.contracts.group import Lost, WorkerGroup
from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.contracts.supervised import RowFacts, SupervisedRole
from rlhf_dist.contracts.tally import merged
from rlhf_dist.data.schedule import Microbatches, assign, minibatch_rows
from rlhf_dist.evaluation.judged import in_words
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.clock import Clock
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.saver import Saver
from rlhf_dist.runs.summary import config_hash, versions
from rlhf_dist.runs.supervision import Budget, rebuild, stuck_report
from rlhf_dist.training.skips import Skips

UNTRAINED_IS_BEST = (
    "no step made the held-out metric better than before training, so there is no export/best; export/model is the last step"
)


@dataclass(frozen=True)
class Setting:
    """What a stage's own phases work with: the group, what is known of its rows, tokens of a microbatch (padding counts unless rows are
    packed), the recorder."""

    group: WorkerGroup
    facts: RowFacts
    budget: int
    recorder: Recorder
    packed: bool = False

    def shares(self, lengths: Sequence[int], rows: Sequence[int] | None = None) -> list[Microbatches]:
        """Rows of a side, all of them by default, shared out over the ranks."""
        chosen = range(len(lengths)) if rows is None else rows
        cost = float if self.facts.costs is None else self.facts.costs.in_tokens
        return assign(chosen, lengths, self.group.world_size, self.budget, packed=self.packed, cost=cost)


Phase = Callable[[Setting], dict[str, Any]]
"""Returns what the summary shall say of it."""


@dataclass(frozen=True)
class Stage:
    """What differs between stages.

    name: of the stage. score: the held-out metric that decides which model is best, and whether more is better.
    derive: metrics that follow from the means, such as perplexity from the loss.
    prepare: a phase before the first step, such as the reference's log-probs. conclude: one after the last, such as a report.
    """

    name: str
    score: str
    more_is_better: bool = False
    derive: Callable[[dict[str, float]], dict[str, float]] = dict
    prepare: Phase | None = None
    conclude: Phase | None = None


class SupervisedLoop:
    """Trains one group of workers on rows.

    Args:
        stage: what differs between stages.
        config: the whole config, for the record; with sections run, model, training.
        group: workers of `SupervisedRole`.
        recorder: writes the run folder.
        reporter: shows progress.
        resume: the checkpoint to go on from; None to begin.
        stopping: whether the run is asked to end early, with its state saved. The same answer on every rank that runs a loop.
    """

    def __init__(
        self,
        stage: Stage,
        config: BaseModel,
        group: WorkerGroup,
        recorder: Recorder,
        reporter: Reporter,
        resume: Checkpoint | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        values: Any = config
        self.stage, self.group, self.recorder, self.reporter = stage, group, recorder, reporter
        self._config = config
        self._training: TrainingSection = values.training
        self._seed, self._budget, self._name = values.run.seed, values.model.microbatch_tokens, values.run.name
        self._packed: bool = values.model.packing
        self._saver = Saver(values.checkpoint, [group], recorder)
        self._every, self._budget_of_restarts = values.checkpoint.every, Budget(values.placement.restarts)
        self._resume, self._stopping, self._recoveries, self._where = resume, stopping, 0, "start"
        self._facts = RowFacts((), (), ())
        self._fresh()

    def run(self) -> dict[str, Any]:
        """The whole run; returns the summary, or `{"stopped": step}` where it was asked to end early.

        Raises:
            UserError: a fault that the user can mend.
        """
        self._began = time.perf_counter()
        while True:
            try:
                return self._run()
            except Lost as lost:
                self._recover(lost)

    def _run(self) -> dict[str, Any]:
        """From the beginning, or from a checkpoint. What comes before the first step needs the models as they were loaded."""
        total = self._start()
        extras = self._phase("prepare", self.stage.prepare, 0)
        if self._resume is not None:
            self._restore(self._resume)
        else:
            self.recorder.rewind(-1, 0)
            if before := self._evaluate(0):
                self.recorder.metrics(0, before)
        for step, rows in enumerate(self._batches(), 1):
            if step <= self._done:
                continue
            if self._stopping():
                return self._stop()
            self._step(step, total, rows)
        self._export("model")  # before the last phase: what it finds wrong must not cost the model
        self._saver.finish()
        extras |= self._phase("conclude", self.stage.conclude, total)
        return self._finish(total, self._wall_seconds(), extras)

    def _step(self, step: int, total: int, rows: tuple[int, ...]) -> None:
        self._where = f"step {step}, train"
        with self._clock.phase("train"):
            metrics = self._train(step, rows)
        if step == total or self._due(step):
            metrics |= self._evaluate(step)
        self.recorder.metrics(step, metrics | {"epoch": step / self._steps_per_epoch} | self._saver.metrics())
        self.reporter.step(step, total, metrics)
        self._done = step
        self._stop_if_spent()
        self._saver.poll()
        if self._every and step % self._every == 0 and step < total:
            self._save()

    def _stop_if_spent(self) -> None:
        """Ends a run that skips and skips; what it learnt before is saved."""
        if spent := self._skips.spent(self._done):
            self._stop()
            raise spent

    def _unsound(self, weight: str) -> UserError:
        self._saver.finish()
        newest = self.recorder.newest_checkpoint(self.reporter.message)
        whole = "nothing was saved yet" if newest is None else f"{newest.folder} is whole"
        fix = f"{whole}; begin anew with a lower learning rate"
        return UserError(f"the weight {weight} is not finite after an optimizer step", where=self._where, fix=fix)

    def _fresh(self) -> None:
        self._best: tuple[float, int] | None = None
        self._evaluations: dict[int, dict[str, float]] = {}
        self._clock, self._done, self._wall_before, self._skips = Clock(), 0, 0.0, Skips(self._training)

    def _save(self) -> None:
        state = {
            "step": self._done,
            "best": None if self._best is None else list(self._best),
            "evaluations": {str(step): metrics for step, metrics in self._evaluations.items()},
            "metrics_bytes": self.recorder.metrics_position,
            "seconds": dict(self._clock.seconds),
            "tokens": self._clock.tokens,
            "wall_seconds": self._wall_seconds(),
            "skipped": self._skips.row,
            "capsules": self._skips.capsules,
        }
        self._saver.begin(self._done, state)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._where = "resume"
        state = checkpoint.state
        try:
            self._best = None if state["best"] is None else (float(state["best"][0]), int(state["best"][1]))
            self._evaluations = {int(step): metrics for step, metrics in state["evaluations"].items()}
            self._clock = Clock(dict(state["seconds"]), state["tokens"])
            self._done, self._wall_before = state["step"], state["wall_seconds"]
            self._skips = Skips(self._training, int(state["skipped"]), int(state.get("capsules", 0)))  # older runs wrote none
            if warning := self.recorder.rewind(self._done, state["metrics_bytes"]):
                self.reporter.message(warning)
        except (KeyError, TypeError, ValueError) as error:
            what = f"the checkpoint's state is not that of a supervised stage: {error!r}"
            raise UserError(what, where=str(checkpoint.folder), fix="use another checkpoint") from None
        self._saver.load(checkpoint)
        self.reporter.message(f"resumed after step {self._done} from {checkpoint.folder}")

    def _stop(self) -> dict[str, Any]:
        self._save()
        self._saver.finish()
        self.recorder.close()
        return {"stopped": self._done}

    def _recover(self, lost: Lost) -> None:
        """New processes, back to the last committed checkpoint.

        Raises:
            UserError: too many recoveries without getting further.
        """
        while True:
            if lost.late:
                text, _ = stuck_report(lost, [self.group], self._where)
                path = self.recorder.stuck(f"stuck_step_{self._done + 1:06d}", text)
                self.reporter.message(f"stuck: what every process is at stands in {path}")
            self._budget_of_restarts.charge(self._done, lost)
            self._recoveries += 1
            self.reporter.message(f"recovering in {self._where}: {lost.what} ({lost.where})")
            try:
                rebuild([self.group])
                self._saver.abandon()  # now nobody writes any more
            except Lost as again:
                lost = again
                continue
            self._resume = self.recorder.newest_checkpoint(self.reporter.message)
            self._fresh()
            return

    def _wall_seconds(self) -> float:
        return self._wall_before + time.perf_counter() - self._began

    def _start(self) -> int:
        self.recorder.config(self._config, self._resume.folder if self._resume else None)
        self._facts = self.group.collect(self.group.submit(SupervisedRole.describe, [()] * self.group.world_size))[0]
        rows = len(self._facts.lengths)
        if not rows:
            raise _nothing_left(self._facts.train_fates)
        self._steps_per_epoch, total = self._training.steps_per_epoch(rows), self._training.total_steps(rows)
        shown = {"rows": rows, "held-out rows": len(self._facts.eval_lengths), "optimizer steps": total, "ranks": self.group.world_size}
        if not self._recoveries:
            self.reporter.started(self._facts.facts | shown | self._facts.fates)
        if self._facts.eval_fates and not self._facts.eval_lengths:
            self.reporter.message(f"nothing will be evaluated: all held-out rows were {in_words(self._facts.eval_fates)}")
        return total

    def _phase(self, name: str, phase: Phase | None, step: int) -> dict[str, Any]:
        if phase is None:
            return {}
        self.reporter.phase(step, name)
        with self._clock.phase(name):
            return phase(self._setting())

    def _batches(self) -> Iterator[tuple[int, ...]]:
        """The rows of every optimizer step: a fresh order an epoch, sizes that differ by one at most."""
        rows, taken = len(self._facts.lengths), 0
        for epoch in range(self._training.epochs):
            for batch in minibatch_rows(rows, 1, self._steps_per_epoch, self._seed, epoch)[0]:
                if taken == self._training.max_steps:
                    return
                taken += 1
                yield batch

    def _train(self, step: int, rows: tuple[int, ...]) -> dict[str, float]:
        shares = self._setting().shares(self._facts.lengths, rows)
        weight = sum(self._facts.weights[row] for row in rows)
        began = time.perf_counter()
        capsule = self.recorder.capsule_path(step, self.group.name, 1), self._skips.left
        requests = [(UpdateRequest(share, weight, *capsule),) for share in shares]
        infos: list[UpdateInfo] = self.group.collect(self.group.submit(SupervisedRole.update, requests))
        seconds, tokens = time.perf_counter() - began, sum(self._facts.lengths[row] for row in rows)
        self._clock.tokens += tokens
        unsound = next((info.unsound for info in infos if info.unsound), "")
        if unsound:
            raise self._unsound(unsound)
        for said in self._skips.note(step, infos[0]):
            self.reporter.message(said)
        taken = infos[0].step
        norm = {} if taken.skipped else {"grad_norm": taken.grad_norm}
        norm["skipped_steps"] = float(taken.skipped)
        rates = {"lr": taken.lr, "perf/tokens_per_second": tokens / seconds, "perf/step_seconds": seconds}
        return merged(info.tally for info in infos).means() | norm | rates

    def _evaluate(self, step: int) -> dict[str, float]:
        if not self._facts.eval_lengths:
            return {}
        self.reporter.phase(step, "evaluate")
        with self._clock.phase("evaluate"):
            shares = self._setting().shares(self._facts.eval_lengths)
            tallies = self.group.collect(self.group.submit(SupervisedRole.evaluate, [(share,) for share in shares]))
        means = merged(tallies).means()
        metrics = {f"eval/{name}": value for name, value in (means | self.stage.derive(means)).items()}
        self._evaluations[step] = metrics
        self._keep_best(step, metrics)
        return metrics

    def _setting(self) -> Setting:
        return Setting(self.group, self._facts, self._budget, self.recorder, self._packed)

    def _keep_best(self, step: int, metrics: dict[str, float]) -> None:
        """Exports the model whenever it is the best so far; before training only the score counts."""
        score = metrics[self.stage.score]
        value = score if self.stage.more_is_better else -score
        if self._best is None or value > self._best[0]:
            self._best = (value, step)
            if step:
                self._export("best")

    def _export(self, which: str) -> None:
        folder = self.recorder.export_path(which)
        self.group.collect(self.group.submit(SupervisedRole.export, [(folder,)] * self.group.world_size))

    def _due(self, step: int) -> bool:
        every = self._training.evaluate_every or self._steps_per_epoch
        return step % every == 0

    def _finish(self, total: int, seconds: float, extras: dict[str, Any]) -> dict[str, Any]:
        evaluations = [self._evaluations[step] for step in sorted(self._evaluations)]
        summary = {
            "stage": self.stage.name,
            "name": self._name,
            "seed": self._seed,
            "config_sha256": config_hash(dump_config(self._config)),
            "steps": total,
            "wall_seconds": seconds,
            "before": evaluations[0] if evaluations else None,
            "after": evaluations[-1] if evaluations else None,
            "best_step": self._best[1] if self._best else None,
            "best": None if self._best is None else "export/best" if self._best[1] else UNTRAINED_IS_BEST,
            "rows": {"train": len(self._facts.lengths), "eval": len(self._facts.eval_lengths)} | self._facts.fates,
            "tokens_per_second": self._clock.tokens / self._clock.seconds["train"],
            "versions": versions(),
        } | extras
        self.recorder.summary(summary)
        self.recorder.close()
        self.reporter.finished(summary)
        return summary


def _nothing_left(fates: dict[str, int]) -> UserError:
    why = f"all rows were {in_words(fates)}" if fates else "the files hold none on this side of the split"
    fix = "mend the rows (`rlhf-dist data validate` lists faulty ones), or loosen data.max_tokens, data.overlong or data.eval_fraction"
    return UserError(f"no row is left to train on: {why}", where="data.train", fix=fix)
