"""What a forward of a causal transformer costs, in floating-point operations: what a schedule balances, and what speed is measured in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FlopModel:
    """Operations of a sequence of s tokens: linear · s + attention · s², and head for every token whose log-prob is asked for.

    A product with a weight takes two a parameter, so linear = 2N of the layers' parameters and head = 2·D·V. Causal attention takes
    A(s) = 2·L·d_q·s² in all: two products of s × s × d_q in each of L layers, of which half is masked. Of a layer with a window, and
    where a kernel computes masked entries, that is not what is done but what is needed.
    """

    linear: float
    attention: float
    head: float = 0.0

    def forward(self, tokens: int, predicted: int = 0) -> float:
        """Operations of a forward.

        Args:
            tokens: of the sequence. predicted: of those, the tokens whose log-prob is asked for.
        """
        return self.linear * tokens + self.attention * tokens**2 + self.head * predicted

    def training(self, *, frozen: bool, recomputed: bool) -> FlopModel:
        """The same for a forward and its backward pass: three forwards.

        Args:
            frozen: weights that only adapters change take no gradient of their own, one product less.
            recomputed: with gradient checkpointing the layers run forward once more.
        """
        weights, again = 2 if frozen else 3, 1 if recomputed else 0
        return FlopModel((weights + again) * self.linear, (3 + again) * self.attention, weights * self.head)

    def in_tokens(self, tokens: int) -> float:
        """The cost of a sequence as that of so many tokens without attention, its log-probs included: for schedules, which count tokens."""
        return tokens + self.attention / (self.linear + self.head) * tokens**2

    def together(self, sequences: float) -> FlopModel:
        """The same where so many equal sequences are counted as one of their summed length."""
        return FlopModel(self.linear, self.attention / sequences, self.head)
