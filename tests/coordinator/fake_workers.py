"""What the ranks of `fake_groups` do: policy, value, reference, reward and rollout, and a recorder in memory.

What a model would learn is a ledger here: every optimizer step appends what it trained on, and a running checksum of that is the "weights".
Samples, scores and advantages are made of the weights that made them, so two runs end with the same ledger only if every one of their calls
saw the same weights.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fake_groups import FakeGroup

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.engine import SavedFile, StepInfo
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.reward import RewardResult
from rlhf_dist.contracts.roles import (
    EstimateRequest,
    ExperienceInfo,
    GenerateRequest,
    PieceInfo,
    RatioInfo,
    RestInfo,
    RolloutInfo,
    ScoreInfo,
    UpdateInfo,
    UpdateRequest,
    WrittenInfo,
)
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.contracts.weights import BucketInfo, Link, Place, SyncInfo
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.recorder import Recorder

BUCKETS = 5
"""Of a sync through the object store: more than are on their way at once."""

Sample = tuple[str, int, int, int, int, int]
"""Stream, step, prompt, number, version of the policy, checksum of its weights."""


def mark(*values: Any) -> int:
    """A checksum of anything that prints the same every time."""
    return zlib.crc32(repr(values).encode())


class MemoryDisk(dict[str, bytes]):
    """Files by path."""

    def write(self, path: str, value: Any) -> SavedFile:
        self[path] = pickle.dumps(value)
        return SavedFile(path.rsplit("/", 1)[-1], len(self[path]), hashlib.sha256(self[path]).hexdigest())

    def read(self, path: str) -> Any:
        return pickle.loads(self[path])


class FolderDisk:
    """Real ones, for the real recorder."""

    def write(self, path: str, value: Any) -> SavedFile:
        file, data = Path(path), pickle.dumps(value)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return SavedFile(file.name, len(data), hashlib.sha256(data).hexdigest())

    def read(self, path: str) -> Any:
        return pickle.loads(Path(path).read_bytes())


class FakeWorker:
    """What all have: a rank in a group. `everyone`: the ranks that meet in a collective call, with what each was given."""

    def __init__(self, group: FakeGroup, rank: int) -> None:
        self.group, self.rank, self.world = group, rank, group.world
        self.everyone: list[tuple[Any, tuple[Any, ...]]] = []

    def rest(self, needs: str) -> RestInfo:
        return RestInfo()

    def rows(self, count: int) -> tuple[int, ...]:
        return tuple(range(count))[self.rank :: self.group.world_size]

    def score(self, shard: list[Sample]) -> Stored[Any, PieceInfo]:
        rows = self.rows(len(shard))
        piece = (self.group.name, {row: mark(self.group.name, shard[row], self.weights_for_scores()) for row in rows})
        return Stored(piece, PieceInfo(rows, 1.0))

    def weights_for_scores(self) -> int:
        return 0


class Sampling(FakeWorker):
    """Samples with the weights it holds, and with no other version."""

    version, held = -1, 0

    def generate(self, request: GenerateRequest) -> Stored[list[Sample], RolloutInfo]:
        if request.version != self.version:
            raise UserError(
                f"asked for samples of policy version {request.version}, but the sampler holds {self.version}", where="generate"
            )
        samples: list[Sample] = [
            (request.stream, request.step, prompt, number, self.version, self.held)
            for prompt in range(request.start, request.start + request.count)
            for number in range(request.samples_per_prompt)
        ]
        n = len(samples)
        lengths = tuple(3 + mark(sample) % 5 for sample in samples)
        prompts, numbers = tuple(sample[2] for sample in samples), tuple(sample[3] for sample in samples)
        return Stored(samples, RolloutInfo(prompts, numbers, (2,) * n, lengths, (0,) * n, (self.version,) * n, 1.0))


class Trained(FakeWorker):
    """Learns a ledger, saves it while it goes on, and takes it up again."""

    def __init__(self, group: FakeGroup, rank: int) -> None:
        super().__init__(group, rank)
        self.ledger: tuple[Any, ...] = ()
        self.weights = mark(group.name)
        self._experience: list[tuple[Sample, int]] = []
        self._written_at, self._files = 0.0, ()

    def weights_for_scores(self) -> int:
        return self.weights

    def costs(self) -> FlopModel:
        return FlopModel(1.0, 0.0)

    def load_experience(self, shards: Sequence[list[tuple[Sample, int]]], advantages: Moments) -> int:
        self._experience = [row for shard in shards for row in shard]
        return len(self._experience)

    def update(self, request: UpdateRequest) -> UpdateInfo:
        """One step on the rows of all ranks together."""
        rows = sorted(row for _, (asked,) in self.everyone for part in asked.microbatches for row in part)
        trained = tuple(self._experience[row] for row in rows)
        seen = {sample[:4] for entry in self.ledger for sample, _ in entry}
        assert not seen & {sample[:4] for sample, _ in trained}, "a sample is trained on twice"
        steps = {sample[1] for sample, _ in trained}
        assert len(steps) == 1, "samples of several steps in one minibatch"
        done = {sample[1] for entry in self.ledger for sample, _ in entry} - steps
        bound = self.world.max_staleness
        for sample, _ in trained:
            assert 0 <= len(done) - sample[4] <= bound, f"{sample} is older than {bound} versions when {len(done)} steps are done"
        self.ledger = (*self.ledger, trained)
        self.weights = mark(self.weights, trained)
        self.world.counts["updates"] += 1
        tally = Tally()
        for name in ("val/ratio_mean_deviation", "val/ratio_max_deviation", "policy/clipfrac_avg"):
            tally.add(name, 0.0, 1)
        return UpdateInfo(tally, StepInfo(1.0, 1e-3), 1.0)

    def begin_save(self, folder: str) -> None:
        path, copy = f"{folder}/rank_{self.rank}", (self.ledger, self.weights)
        start = max(self.world.now, self._written_at)
        self._written_at = start + self.world.duration("save")
        self._files = (MemoryDisk().write(path, copy),)
        self.world.at(self._written_at - self.world.now, lambda: self._write(path, copy))

    def _write(self, path: str, copy: Any) -> None:
        rank = self.group.ranks[self.rank]
        if rank.worker is self and not rank.dead:
            self.world.disk.write(path, copy)

    def still(self, method: str, given: tuple[Any, ...]) -> float:
        """Seconds of writing that a call waits for."""
        return max(0.0, self._written_at - self.world.now) if method == "saved" and given[0] else 0.0

    def saved(self, wait: bool) -> tuple[SavedFile, ...] | None:
        return None if self.world.now < self._written_at else self._files

    def load_state(self, folder: str) -> None:
        self.ledger, self.weights = self.world.disk.read(f"{folder}/rank_0")

    def export(self, folder: str) -> None:
        if self.rank == 0:
            self.world.disk.write(f"{folder}/model", (self.ledger, self.weights))


class FakePolicy(Trained, Sampling):
    """The policy; where a rollout group samples, it sends its weights there."""

    def __init__(self, group: FakeGroup, rank: int) -> None:
        super().__init__(group, rank)
        self._exported = 0

    def describe(self) -> dict[str, Any]:
        return {"held_out_prompts": self.world.held_out}

    def reference_score(self, shard: list[Sample]) -> Stored[Any, PieceInfo]:
        rows = self.rows(len(shard))
        return Stored(("reference", {row: mark("reference", shard[row], 0) for row in rows}), PieceInfo(rows, 1.0))

    def estimate(self, request: EstimateRequest, shard: list[Sample], pieces: Sequence[Any]) -> Stored[Any, ExperienceInfo]:
        scored = _merged(shard, pieces)
        given = (request.kl_coef, round(request.baseline, 9) + 0.0)  # the order of a sum over shards shows in its last digits
        rows = [
            (sample, mark(sample, score, scored[row], given)) for row, (sample, score) in enumerate(zip(shard, request.scores, strict=True))
        ]
        n, tally = len(rows), Tally()
        tally.add("objective/rlhf_reward", sum(request.scores), n)
        kl = tuple(mark(each) % 128 / 128 for each in scored)
        lengths = tuple(3 + mark(sample) % 5 for sample in shard)
        moments = Moments(2 * n, 0.0, 1.0)
        return Stored(rows, ExperienceInfo((2,) * n, lengths, lengths, kl, moments, moments, tally))

    def ratio_check(self, shard: list[Sample], pieces: Sequence[Any]) -> RatioInfo:
        _merged(shard, pieces)
        tally = Tally()
        for name in ("ratio", "sampler", "reference"):
            tally.add(f"{name}/mean", 0.0, 1)
            tally.peak(f"{name}/max", 0.0)
        return RatioInfo(tally)

    def sync_weights(self, version: int) -> SyncInfo:
        assert version == self._steps(), f"version {version}, but the policy took {self._steps()} steps"
        self.version, self.held = version, self.weights
        return SyncInfo(self.weights)

    def _steps(self) -> int:
        return len({sample[1] for entry in self.ledger for sample, _ in entry})

    def place(self) -> Place:
        return Place("", "cpu", "host")

    def open_link(self, link: Link) -> Link:
        return Link(link.transport, link.backend, link.address, next(self.world.numbers), link.receivers, link.bucket_bytes, link.timeout_s)

    def send_weights(self, link: Link) -> SyncInfo:
        return SyncInfo(self.weights, 8, 1)

    def next_weights(self, bucket_bytes: int) -> Stored[Any, BucketInfo]:
        """Bucket after bucket; an export that nobody ended goes on where it was."""
        self._exported = (self._exported + 1) % (BUCKETS + 1)
        if self._exported == 0:
            return Stored({}, BucketInfo(0, SyncInfo(self.weights, 8, BUCKETS)))
        return Stored({self._exported: self.weights}, BucketInfo(4))

    def save_rollouts(self, folder: str, shards: Sequence[list[Sample]], infos: Sequence[RolloutInfo]) -> tuple[SavedFile, ...]:
        if self.rank:
            return ()
        both = enumerate(zip(shards, infos, strict=True))
        return tuple(self.world.disk.write(f"{folder}/{number}", each) for number, each in both)

    def load_rollouts(self, folder: str, number: int) -> Stored[list[Sample], RolloutInfo]:
        return Stored(*self.world.disk.read(f"{folder}/{number}"))

    def write_rollouts(self, path: str, shards: Sequence[list[Sample]], pieces: Sequence[Any], details: Any) -> WrittenInfo:
        if self.rank:
            return WrittenInfo()
        for shard, parts in zip(shards, pieces, strict=True):
            _merged(shard, parts)
        rows = sum(map(len, shards))
        self.world.disk.write(path, [sample for shard in shards for sample in shard])
        return WrittenInfo(rows, (0.5,) * rows)


class FakeRollout(Sampling):
    """Samples with what the policy sent."""

    def __init__(self, group: FakeGroup, rank: int) -> None:
        super().__init__(group, rank)
        self._taken: dict[int, int] = {}

    def place(self) -> Place:
        return Place("", "cpu", "host")

    def receive_weights(self, version: int, link: Link) -> SyncInfo:
        sent = next(worker.weights for worker, _ in self.everyone if isinstance(worker, FakePolicy))
        self.version, self.held = version, sent
        return SyncInfo(sent, 8, 1)

    def take_weights(self, bucket: dict[int, int]) -> int:
        self.version = -1
        self._taken |= bucket
        return 4

    def hold_weights(self, version: int, sent: SyncInfo) -> SyncInfo:
        if self._taken != dict.fromkeys(range(1, BUCKETS + 1), sent.checksum):
            raise UserError("the sampler does not hold what was sent", where="rollout")
        self._taken = {}
        self.version, self.held = version, sent.checksum
        return SyncInfo(sent.checksum, 8, BUCKETS)


class FakeReward(FakeWorker):
    """A number a sample."""

    def quarantine_to(self, path: str) -> None:
        self.quarantine = path

    def judge(self, shard: list[Sample], stream: str = "train", step: int | None = None) -> ScoreInfo:
        assert self.quarantine, "nobody said where failed samples go"
        rows = self.rows(len(shard))
        return ScoreInfo(rows, (RewardResult("even", tuple(mark(shard[row]) % 1024 / 1024 for row in rows)),), 1.0)


def _merged(shard: Sequence[Sample], pieces: Sequence[Any]) -> list[tuple[int, ...]]:
    """What every model says of each row."""
    said: dict[str, dict[int, int]] = {}
    for name, marks in pieces:
        said.setdefault(name, {}).update(marks)
    assert {"policy", "reference"} <= said.keys()
    for name, marks in said.items():
        assert len(marks) == len(shard), f"{name} did not score every row"
    return [tuple(said[name][row] for name in sorted(said)) for row in range(len(shard))]


class MemoryRecorder(Recorder):
    """Without a disk that makes a schedule take long: the same calls, the same rules."""

    def __init__(self, disk: MemoryDisk) -> None:
        super().__init__(None)
        self.disk = disk
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.committed: dict[int, Checkpoint] = {}
        self.reports: dict[str, str] = {}

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))

    @property
    def metrics_position(self) -> int:
        return len(self.lines)

    def rewind(self, step: int, position: int) -> None:
        assert position <= len(self.lines)
        del self.lines[position:]

    def rollouts_path(self, step: int) -> str:
        return f"rollouts/{step}"

    def evaluation_path(self, step: int) -> str:
        return f"evaluation/{step}"

    def quarantine_path(self) -> str:
        return "quarantine"

    def export_path(self, role: str) -> str:
        return f"export/{role}"

    def begin_checkpoint(self, step: int) -> str:
        return f"partial/{step}"

    def commit_checkpoint(self, step: int, state: dict[str, Any], written: Iterable[SavedFile], keep: int) -> None:
        partial, final = f"partial/{step}/", f"final/{step}/"
        files = {file.name: file for file in written}
        for path in [path for path in self.disk if path.startswith(partial)]:
            self.disk[final + path.removeprefix(partial)] = self.disk.pop(path)
        self.committed[step] = Checkpoint(Path(f"final/{step}"), step, 0.0, files, json.loads(json.dumps(state)), {})
        for old in sorted(self.committed)[:-keep]:
            del self.committed[old]

    def newest_checkpoint(self, refused: Callable[[str], None]) -> Checkpoint | None:
        return self.committed[max(self.committed)] if self.committed else None

    def clear_partial(self) -> None:
        for path in [path for path in self.disk if path.startswith("partial/")]:
            del self.disk[path]

    def stuck(self, name: str, text: str) -> str:
        self.reports[name] = text
        return name
