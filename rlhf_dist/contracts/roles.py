"""What the coordinator may ask of each role, and the small records that come back. Tensors stay where they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from rlhf_dist.contracts.engine import SavedFile, StepInfo
from rlhf_dist.contracts.experience import ExperienceBatch, Piece
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.reward import RewardResult
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.contracts.weights import BucketInfo, Link, Place, SyncInfo

Stream = Literal["train", "eval"]
Needs = Literal["nothing", "sampler", "weights", "sync", "training"]
"""What a phase needs of a worker's models on the device. sampler: the weights it samples with; weights: those of its engine; sync: both;
training: the engine's weights, gradients and optimiser state."""
Fault = Literal["", "loss", "gradient"]
NOT_WRITTEN = "not written"
"""How the reason begins why there is no capsule."""


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts `start` to `start + count` of a stream, each sampled `samples_per_prompt` times.

    The workers read the prompts themselves: text never passes through the coordinator.
    `step` and the stream key the random numbers; `step_start` is where the step's prompts begin, so that a prompt that comes
    twice in one step gets other sample numbers the second time, wherever the shards are cut.
    """

    stream: Stream
    step: int
    step_start: int
    start: int
    count: int
    samples_per_prompt: int
    version: int
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class RolloutInfo:
    """A generated shard in numbers: one entry a sample, in row order; seconds are this rank's.

    dropped_prompts, truncated_prompts: too long ones, in the shard's part of the stream of prompts.
    """

    prompt_ids: tuple[int, ...]
    sample_indices: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    stop_reasons: tuple[int, ...]
    versions: tuple[int, ...]
    seconds: float
    tally: Tally = field(default_factory=Tally)
    dropped_prompts: int = 0
    truncated_prompts: int = 0


@dataclass(frozen=True)
class RatioInfo:
    """What this rank's rows show of law 3, as means and maxima over tokens.

    `ratio`: |ρ − 1| of a fresh forward against the old log-probs; `sampler`: |log-prob gap| between sampler and trainer;
    `reference`: |k1| to the reference.
    """

    tally: Tally


@dataclass(frozen=True)
class ScoreInfo:
    """Raw rewards of the rows one rank judged."""

    rows: tuple[int, ...]
    results: tuple[RewardResult, ...]
    seconds: float
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class PieceInfo:
    """What a scoring rank reports beside its tensors."""

    rows: tuple[int, ...]
    seconds: float
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class EstimateRequest:
    """Everything but tensors that advantage estimation of one shard needs; lists are one entry a row."""

    scores: tuple[float, ...]
    raw: dict[str, tuple[float | None, ...]]
    keep: tuple[bool, ...]
    kl_coef: float
    baseline: float
    reward_moments: Moments | None = None


@dataclass(frozen=True)
class ExperienceInfo:
    """An experience shard in numbers: per-row lengths, per-row KL sums (nats), moments of advantages and of token rewards."""

    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    valid_tokens: tuple[int, ...]
    kl: tuple[float, ...]
    advantages: Moments
    token_rewards: Moments
    tally: Tally
    seconds: float = 0.0


@dataclass(frozen=True)
class UpdateRequest:
    """One rank's part of one optimizer step.

    microbatches: row numbers in the whole step's experience; every rank gets the same number, empty ones included.
    denominator: global, as the loss reduction asks. capsule: where the step is written down if it is skipped; empty: nowhere.
    capsules: how many may still be written; in PPO, when the step's experience was loaded.
    """

    microbatches: tuple[tuple[int, ...], ...]
    denominator: float
    capsule: str = ""
    capsules: int = 0


@dataclass(frozen=True)
class UpdateInfo:
    """Metrics of one optimizer step: this rank's sums, the engine's global step report.

    fault: what was not finite, so that the step was skipped, the same on all ranks; an overflow of fp16's loss scale is none.
    capsule: where that was written down, or why it could not be. unsound: a weight of this rank that is not finite.
    """

    tally: Tally
    step: StepInfo
    seconds: float
    fault: Fault = ""
    capsule: str = ""
    unsound: str = ""


@dataclass(frozen=True)
class WrittenInfo:
    """Rows that were written, and their Σ k1 in nats (empty on ranks that write nothing)."""

    rows: int = 0
    kl: tuple[float, ...] = ()


@dataclass(frozen=True)
class RestInfo:
    """What of a rank's models is off the device.

    training, weights: bytes that are away now. seconds: of all leaving and coming back so far. stays: what cannot leave, and why.
    """

    training: int = 0
    weights: int = 0
    seconds: float = 0.0
    stays: str = ""

    def __add__(self, other: RestInfo) -> RestInfo:
        """Of two models on one rank."""
        seconds = self.seconds + other.seconds
        return RestInfo(self.training + other.training, self.weights + other.weights, seconds, self.stays or other.stays)


class RestingRole(Protocol):
    """Every role: its models leave the device when others need it. What a later call needs comes back with that call."""

    def rest(self, needs: Needs) -> RestInfo:
        """What the coming phase does not need leaves the device."""
        ...


class ScoringRole(Protocol):
    """Reference and value engines, and the policy itself, score shards; each rank takes its rows."""

    def score(self, shard: ExperienceBatch) -> Stored[Piece, PieceInfo]:
        """Collective. Tensors for this rank's rows of the shard."""
        ...


class SavedRole(Protocol):
    """Those that learn: what they hold must not be lost."""

    def begin_save(self, folder: str) -> None:
        """Copies what this rank must not lose, and begins to write it; what comes next changes nothing in the copy."""
        ...

    def saved(self, wait: bool) -> tuple[SavedFile, ...] | None:
        """What was written since `begin_save`; None: not all of it yet."""
        ...

    def load_state(self, folder: str) -> None:
        """Collective. Takes up what `begin_save` of any number of ranks wrote."""
        ...


class TrainedRole(SavedRole, Protocol):
    """Policy and value train on the step's experience."""

    def costs(self) -> FlopModel:
        """What a forward of the model costs."""
        ...

    def load_experience(self, shards: Sequence[ExperienceBatch], advantages: Moments) -> int:
        """Keeps the step's experience; returns its number of rows."""
        ...

    def update(self, request: UpdateRequest) -> UpdateInfo:
        """Collective. One optimizer step."""
        ...

    def export(self, folder: str) -> None:
        """Collective. Writes a Hugging Face folder (rank 0)."""
        ...


class SamplingRole(Protocol):
    """Samples completions: the policy's own processes, or a rollout group beside them."""

    def generate(self, request: GenerateRequest) -> Stored[ExperienceBatch, RolloutInfo]:
        """Not collective. Samples this rank's prompts."""
        ...


class RolloutRole(SamplingRole, Protocol):
    """Samples in processes of its own, from weights that the policy sends. A call begins when those before it are done: weights that were
    asked to be taken after a generation never reach it."""

    def place(self) -> Place:
        """Where this rank's weights are."""
        ...

    def receive_weights(self, version: int, link: Link) -> SyncInfo:
        """Takes all weights over a link, while the policy sends them (`PolicyRole.send_weights`)."""
        ...

    def take_weights(self, bucket: Mapping[str, Tensor]) -> int:
        """Takes one bucket that came by reference; returns its bytes."""
        ...

    def hold_weights(self, version: int, sent: SyncInfo) -> SyncInfo:
        """All buckets have come."""
        ...


class PolicyRole(SamplingRole, ScoringRole, TrainedRole, Protocol):
    """Generates where no rollout group does, scores samples, estimates advantages, trains."""

    def describe(self) -> dict[str, Any]:
        """Facts about model and data: parameters, stop tokens, number of held-out prompts."""
        ...

    def reference_score(self, shard: ExperienceBatch) -> Stored[Piece, PieceInfo]:
        """Collective. Reference log-probs with the adapter off (LoRA only)."""
        ...

    def estimate(
        self, request: EstimateRequest, shard: ExperienceBatch, pieces: Sequence[Piece]
    ) -> Stored[ExperienceBatch, ExperienceInfo]:
        """Not collective. Puts a shard's pieces together and computes rewards, advantages and returns."""
        ...

    def ratio_check(self, shard: ExperienceBatch, pieces: Sequence[Piece]) -> RatioInfo:
        """Collective. Compares a fresh training forward, cut differently, with the sampler, the old and the reference log-probs."""
        ...

    def sync_weights(self, version: int) -> SyncInfo:
        """Collective. Makes the sampler in this process use the trainer's weights; their checksum is equal on every rank."""
        ...

    def place(self) -> Place:
        """Where this rank's weights are."""
        ...

    def open_link(self, link: Link) -> Link:
        """Not collective; on rank 0 only. Opens the store where the rollout ranks meet this one; returns the link with its port."""
        ...

    def send_weights(self, link: Link) -> SyncInfo:
        """Collective. Exports all weights, adapters merged; rank 0 sends them over the link. Each rank returns what it exported."""
        ...

    def next_weights(self, bucket_bytes: int) -> Stored[Mapping[str, Tensor], BucketInfo]:
        """Collective. The next bucket of an export, which rank 0 keeps for others to fetch; the call after the last says that it was."""
        ...

    def save_rollouts(self, folder: str, shards: Sequence[ExperienceBatch], infos: Sequence[RolloutInfo]) -> tuple[SavedFile, ...]:
        """Not collective; rank 0 writes shards whose policy will be gone, the others nothing."""
        ...

    def load_rollouts(self, folder: str, number: int) -> Stored[ExperienceBatch, RolloutInfo]:
        """Not collective. One of the shards of `save_rollouts`."""
        ...

    def write_rollouts(
        self, path: str, shards: Sequence[ExperienceBatch], pieces: Sequence[Sequence[Piece]], details: Sequence[dict[str, Any]]
    ) -> WrittenInfo:
        """Not collective; rank 0 writes a Parquet file, the others nothing.

        `pieces` and `details` (one dict of per-row lists: raw rewards, score, kept) have one entry a shard.
        """
        ...


class RewardRole(Protocol):
    """Judges completions."""

    def quarantine_to(self, path: str) -> None:
        """Not collective. From now on this rank appends the samples on which a reward fails to a file, a JSON line each, itself."""
        ...

    def judge(self, shard: ExperienceBatch, stream: Stream = "train", step: int | None = None) -> ScoreInfo:
        """Collective where a reward is a model. Raw rewards of this rank's rows.

        stream, step: what the shard was sampled for: a failed sample is written down with them.
        """
        ...
