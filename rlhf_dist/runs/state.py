"""The one state object of the coordinator: everything it must know to go on, apart from what the engines save themselves."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

from pydantic import ConfigDict, Field, Strict, StrictFloat, StrictInt, TypeAdapter, ValidationError

from rlhf_dist.config.errors import UserError

FORMAT = 2
Count: TypeAlias = Annotated[int, Strict(), Field(ge=0, lt=2**63)]


@dataclass
class RunState:
    """Mutable: the coordinator advances it. There is no generator state in it, because sampling and shuffles count from the seed (law 9).

    step: PPO steps done, so also the index of the next. policy_version: of the weights the sampler has, which is the number
    of steps that trained them (law 8).
    prompt_cursor: training prompts consumed. kl_coef: β. baseline: running mean of `reinforce`.
    reward_mixer: running moments by reward name, as JSON-able values. best_score, best_step: best held-out evaluation so far.
    dropped: samples left out, by reason. optimizer_steps: policy optimizer steps done. kl: of the last step, nats a sequence.
    held_out, yardstick: first and latest evaluation, and the reward moments of the first. metrics_bytes: length of `metrics.jsonl`.
    seconds, worked, tokens: by phase, for the summary. weights: checksum of the weights the sampler has, as the last sync saw it.
    pending: steps whose rollouts were sampled by policies that are gone, with their number of shards.
    sentinels: what they remember of the steps before.
    """

    step: Count = 0
    policy_version: Count = 0
    prompt_cursor: Count = 0
    kl_coef: StrictFloat = 0.0
    baseline: StrictFloat = 0.0
    reward_mixer: dict[str, Any] = field(default_factory=dict)
    best_score: StrictFloat | None = None
    best_step: Count | None = None
    dropped: dict[str, Count] = field(default_factory=dict)
    optimizer_steps: Count = 0
    kl: StrictFloat | None = None
    held_out: dict[str, Any] = field(default_factory=dict)
    yardstick: dict[str, Any] = field(default_factory=dict)
    metrics_bytes: Count = 0
    seconds: dict[str, dict[str, StrictFloat]] = field(default_factory=dict)
    tokens: dict[str, Count] = field(default_factory=dict)
    weights: StrictInt = 0
    pending: dict[Annotated[str, Field(pattern="^[0-9]{1,18}$")], Count] = field(default_factory=dict)
    sentinels: dict[str, Any] = field(default_factory=dict)

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    def count_dropped(self, reason: str, samples: int) -> None:
        """Counts samples that were left out."""
        if samples:
            self.dropped[reason] = self.dropped.get(reason, 0) + samples

    def record_evaluation(self, score: float, step: int) -> bool:
        """Notes a held-out score; returns whether it is the best so far (the first of equal ones stays)."""
        better = self.best_score is None or score > self.best_score
        if better:
            self.best_score, self.best_step = score, step
        return better

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives back an equal state.

        Raises:
            ValueError: NaN or infinity in it, or a value that JSON would not give back equal (a tuple, a number as key).
        """
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        try:
            returned = json.loads(json.dumps(values, allow_nan=False))
        except TypeError as error:
            raise ValueError(f"the run state cannot be saved: {error}") from None
        if returned != values:
            changed = [key for key in values if returned.get(key) != values[key]]
            raise ValueError(f"the run state would change when saved: {', '.join(changed)}")
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunState:
        """What `to_dict` gave.

        Raises:
            UserError: another format, a missing or unknown key, a wrong type.
        """
        fields = dict(values)
        if fields.pop("format", None) != FORMAT:
            raise UserError(
                f"run state of format {values.get('format')!r}; this version reads {FORMAT}",
                where="run state",
                fix="use the version that wrote it",
            )
        missing = {f.name for f in dataclasses.fields(cls)} - fields.keys()
        if missing:
            raise UserError(f"the run state lacks {', '.join(sorted(missing))}", where="run state", fix="use another checkpoint")
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"the run state is not valid: {faults}", where="run state", fix="use another checkpoint") from None

    def to_json(self) -> str:
        """`to_dict` as text. Floats are written with the digits that give them back bit for bit."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunState:
        """What `to_json` gave.

        Raises:
            UserError: not JSON, or as `from_dict`.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the run state is not JSON: {error}", where="run state", fix="use another checkpoint") from None
        if not isinstance(values, dict):
            raise UserError("the run state is not an object", where="run state", fix="use another checkpoint")
        return cls.from_dict(values)
