"""A reward that is a model on an engine of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rlhf_dist.contracts.engine import Engine
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.reward import RewardResult, checked_result
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.data.microbatches import token_budget_cuts
from rlhf_dist.models.classifier import EncodedTexts
from rlhf_dist.models.flops import flops_of, forward_flops
from rlhf_dist.rewards.text import RewardEncoder


class ModelReward:
    """Scores rollouts with a sequence classifier.

    Args:
        name: name in metrics and messages.
        engine: holds a `ClassifierModule`.
        encoder: makes its inputs.
        microbatch_tokens: tokens of one forward, padding included unless the module packs; a longer text travels alone.
    """

    def __init__(self, name: str, engine: Engine, encoder: RewardEncoder, microbatch_tokens: int) -> None:
        self.name = name
        self._engine: Any = engine  # its microbatches are whatever its module's `inputs` takes: here EncodedTexts
        self._encoder = encoder
        self._microbatch_tokens = microbatch_tokens

    def score(self, batch: ExperienceBatch, rows: Sequence[int]) -> tuple[RewardResult, Tally]:
        """Scores some rows of a shard. Collective: every rank of the engine calls it equally often, also with no rows.

        Returns:
            The values in the order of `rows`; None, an abstention, where a row has no text to judge. The tally counts
            `rewards/<name>_truncated`, the share of rows cut to the model's context, and the speed `perf/<name>_score_tflops`.

        Raises:
            UserError: a row that is too long, or a score that is not finite.
        """
        texts = self._encoder.encode(batch.select(rows)) if rows else EncodedTexts.from_rows([])
        lengths = texts.lengths
        judged = [row for row, length in enumerate(lengths) if length]
        module = self._engine.module
        cut_rows = token_budget_cuts([lengths[row] for row in judged], self._microbatch_tokens, packed=module.packing)
        cuts = [[judged[i] for i in cut] for cut in cut_rows]
        microbatches = [texts.select(cut) for cut in cuts]
        began = time.perf_counter()
        outputs = self._engine.forward(microbatches)
        seconds = time.perf_counter() - began
        values: list[float | None] = [None] * len(rows)
        for cut, output in zip(cuts, outputs, strict=True):
            for row, score in zip(cut, output["score_B"].tolist(), strict=True):
                values[row] = score
        tally = Tally()
        tally.add(f"rewards/{self.name}_truncated", texts.truncated, len(rows))
        if cuts:
            tally.add(f"perf/{self.name}_score_tflops", flops_of(forward_flops(module), microbatches) / 1e12, seconds)
        return checked_result(self.name, values, len(rows), f"model reward {self.name!r}"), tally
