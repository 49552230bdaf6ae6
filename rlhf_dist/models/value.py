"""The module inside a value engine: a backbone of its own and a linear head, read at the state before each response token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.inputs import blank_batch, model_inputs


class ValueModule(nn.Module):
    """Wraps a Hugging Face sequence-classification model with one label, so that its export loads with `AutoModelForSequenceClassification`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: dict[str, Tensor], response_lengths_B: Tensor, width: int) -> dict[str, Tensor]:
        """Values of the states before each response token, and of the state after the last.

        Returns:
            values_BT float32: V at position P − 1 + t; bootstrap_value_B float32: V at position P + len − 1 (NUMERICS §1).
        """
        backbone = getattr(self.model, str(self.model.base_model_prefix))
        hidden_BLD = backbone(**tokens, use_cache=False).last_hidden_state
        states = self.model.score(hidden_BLD[:, -width - 1 :]).squeeze(-1).float()
        bootstrap_value_B = states.detach().gather(1, response_lengths_B.unsqueeze(1)).squeeze(1)  # an input to GAE, never trained on
        return {"values_BT": states[:, :width], "bootstrap_value_B": bootstrap_value_B}

    def inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """Keyword arguments of `forward` for a batch."""
        return {"tokens": model_inputs(batch), "response_lengths_B": batch.response_lengths_B, "width": batch.response_tokens_BT.shape[1]}

    def blank(self) -> SequenceBatch:
        """A batch that counts for nothing."""
        return blank_batch()
