"""How fast a phase could be at most: floating-point operations and bytes against what the machine can do. Pure arithmetic.

Operations are those of `rlhf_dist.contracts.flops.FlopModel`: Fwd(N) = 2·N·T + Σ A(s), A(s) = 2·L·d_q·s². N is split into the layers, which
every token meets, and the head, which is needed only where a log-prob or a next token is wanted: so no limit counts work that nobody needs.

Decoding reads all weights and all keys and values once a step, so each step takes the longer of reading and computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_dist.contracts.flops import FlopModel


@dataclass(frozen=True)
class Ceilings:
    """F and W of a machine: floating-point operations a second in matrix products, bytes a second in copying."""

    flops: float
    bytes_per_second: float


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row's prompt and of its completion."""

    prompts: Sequence[int]
    completions: Sequence[int]


@dataclass(frozen=True)
class Sampled:
    """A model that decodes. flops: of its forward. kv_numbers: keys and values that it keeps of a token."""

    flops: FlopModel
    kv_numbers: int

    @property
    def weights(self) -> float:
        """N, head included: every decode step reads them."""
        return (self.flops.linear + self.flops.head) / 2

    def step_flops(self, rows: int, keys: int) -> float:
        """2N·n + 4·L·d_q·Σ(P+t): of a decode step with so many rows, which attend to so many keys in all."""
        return 2.0 * self.weights * rows + 2.0 * self.flops.attention * keys

    def step_bytes(self, keys: int, width: int) -> float:
        """N·b + kv·Σ(P+t). width: bytes of a number, b."""
        return width * (self.weights + self.kv_numbers * keys)


def sequences_flops(model: FlopModel, lengths: Lengths) -> float:
    """Of whole sequences, with a log-prob at every response token."""
    return sum(model.forward(prompt + tokens, tokens) for prompt, tokens in zip(lengths.prompts, lengths.completions, strict=True))


def prefill_flops(model: Sampled, lengths: Lengths) -> float:
    """Of all prompts; the last token of each needs the head."""
    return sum(model.flops.forward(prompt, 1) for prompt in lengths.prompts)


def decode_steps(lengths: Lengths) -> list[tuple[int, int]]:
    """Rows that live and keys that they attend to, of every step, when all rows begin at once.

    Step t (from 1) feeds the t-th token and gives the next: a row with R tokens lives through R − 1 steps.
    """
    rows = list(zip(lengths.prompts, lengths.completions, strict=True))
    live = [[prompt + step for prompt, tokens in rows if tokens > step] for step in range(1, max(lengths.completions))]
    return [(len(contexts), sum(contexts)) for contexts in live]


def decode_flops(model: Sampled, lengths: Lengths) -> float:
    """Of all steps."""
    return sum(model.step_flops(rows, keys) for rows, keys in decode_steps(lengths))


def decode_seconds(model: Sampled, lengths: Lengths, ceilings: Ceilings, width: int) -> float:
    """Σ_t max{[N·b + kv·Σ_live(P+t)]/W, [2N·n_t + 4L·d_q·Σ_live(P+t)]/F}. width: bytes of a number, b."""
    return sum(
        max(model.step_bytes(keys, width) / ceilings.bytes_per_second, model.step_flops(rows, keys) / ceilings.flops)
        for rows, keys in decode_steps(lengths)
    )


@dataclass(frozen=True)
class Iteration:
    """One PPO iteration: who samples, who scores (of a forward each), who is trained (of a forward and backward pass each), how often."""

    policy: Sampled
    scored: Sequence[FlopModel]
    trained: Sequence[FlopModel]
    epochs: int = 1

    def scoring_flops(self, lengths: Lengths) -> float:
        """Σ Fwd(N)."""
        return sum(sequences_flops(model, lengths) for model in self.scored)

    def training_flops(self, lengths: Lengths) -> float:
        """E·Σ k·Fwd(N)."""
        return self.epochs * sum(sequences_flops(model, lengths) for model in self.trained)

    def flops(self, lengths: Lengths) -> float:
        """All of them: what the time of an iteration is said to grow with."""
        generated = prefill_flops(self.policy, lengths) + decode_flops(self.policy, lengths)
        return generated + self.scoring_flops(lengths) + self.training_flops(lengths)

    def seconds(self, lengths: Lengths, ceilings: Ceilings, width: int) -> dict[str, float]:
        """The least time of each phase; `generate` is prefill and decode together."""
        prefill = prefill_flops(self.policy, lengths) / ceilings.flops
        decode = decode_seconds(self.policy, lengths, ceilings, width)
        return {
            "prefill": prefill,
            "decode": decode,
            "generate": prefill + decode,
            "score": self.scoring_flops(lengths) / ceilings.flops,
            "train": self.training_flops(lengths) / ceilings.flops,
        }
