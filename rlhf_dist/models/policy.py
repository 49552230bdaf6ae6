"""The module inside a policy or reference engine: a causal LM that answers with log-probabilities of the response tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.inputs import blank_batch, model_inputs, width_step
from rlhf_dist.models.logprobs import HeadOptions, logprobs_and_entropy


class PolicyModule(nn.Module):
    """Wraps a Hugging Face (or peft) causal LM.

    Args:
        model: the causal LM.
        options: the τ of sampling, in every log-probability; whether the entropy is trained on.
    """

    def __init__(self, model: nn.Module, options: HeadOptions | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.options = options or HeadOptions()

    def forward(self, tokens: dict[str, Tensor], places_BT: Tensor, adapter: bool = True) -> dict[str, Tensor]:
        """Log-probabilities and entropies at the response positions.

        The head runs on the columns before those in which some row has a response token: the logits of a column predict the next one.

        Args:
            tokens: input_ids, attention_mask, position_ids [B, L] of `model_inputs`.
            places_BT: columns of the response tokens.
            adapter: False for the model without its LoRA adapter.

        Returns:
            logprobs_BT, entropy_BT: float32, nats. Padded slots hold numbers of other slots, which mean nothing.
        """
        length = tokens["input_ids"].shape[1]
        first = max(length - places_BT.shape[1], 1)  # the first column that is predicted
        with self._adapter(adapter):
            output = self.model(**tokens, use_cache=False, logits_to_keep=length - first + 1)
        per_column = logprobs_and_entropy(output.logits[:, first - length - 1 : -1], tokens["input_ids"][:, first:], self.options)
        at_BT = (places_BT - first).clamp(min=0)
        return {name: column.gather(1, at_BT) for name, column in zip(("logprobs_BT", "entropy_BT"), per_column, strict=True)}

    def inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """Keyword arguments of `forward` for a batch."""
        tokens, places_BT = model_inputs(batch, width_step(self))
        return {"tokens": tokens, "places_BT": places_BT}

    def blank(self) -> SequenceBatch:
        """A batch that counts for nothing."""
        return blank_batch()

    def _adapter(self, on: bool) -> AbstractContextManager[Any]:
        return nullcontext() if on else self.model.disable_adapter()  # type: ignore[no-any-return]
