"""The module inside a value engine: a backbone of its own and a linear head, read at the state before each response token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.inputs import blank_batch, model_inputs, width_step


class ValueModule(nn.Module):
    """Wraps a Hugging Face (or peft) sequence classifier with one label: its export loads with `AutoModelForSequenceClassification`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: dict[str, Tensor], places_BT: Tensor) -> dict[str, Tensor]:
        """Values of the states before each response token, and of the state after the last.

        Args:
            tokens: input_ids, attention_mask, position_ids [B, L] of `model_inputs`.
            places_BT: columns of the response tokens.

        Returns:
            values_BT float32: V at position P − 1 + t, numbers without meaning in padded slots; bootstrap_value_B float32: V at
            position P + len − 1, the last token of the row (NUMERICS §1), without gradient: an input to GAE, never trained on.
        """
        first = max(tokens["input_ids"].shape[1] - places_BT.shape[1], 1) - 1  # the first state that is read
        model = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        hidden_BLD = getattr(model, model.base_model_prefix)(**tokens, use_cache=False).last_hidden_state
        states = model.score(hidden_BLD[:, first:]).squeeze(-1).float()
        values_BT = states.gather(1, (places_BT - 1 - first).clamp(min=0))
        return {"values_BT": values_BT, "bootstrap_value_B": states[:, -1].detach()}

    def inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """Keyword arguments of `forward` for a batch."""
        tokens, places_BT = model_inputs(batch, width_step(self))
        return {"tokens": tokens, "places_BT": places_BT}

    def blank(self) -> SequenceBatch:
        """A batch that counts for nothing."""
        return blank_batch()
