"""The module inside a value engine: a backbone of its own and a linear head, read at the state before each response token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.head import wants_one_row
from rlhf_dist.models.inputs import blank_batch, model_inputs, width_step
from rlhf_dist.models.packing import HEAD_ROUNDING, lively_head, packed_states, refuse_leaks, three_sequences


class ValueModule(nn.Module):
    """Wraps a Hugging Face (or peft) sequence classifier with one label: its export loads with `AutoModelForSequenceClassification`.

    Args:
        model: the classifier.
        packing: put several sequences in one row (`models.packing`); what comes out is the same up to rounding.

    Raises:
        UserError: packing, and an architecture in which packed sequences see each other.
    """

    def __init__(self, model: nn.Module, *, packing: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.packing = packing
        if packing:
            with lively_head(self._base.score):
                refuse_leaks(self, lambda: self.inputs(three_sequences()), "values_BT", HEAD_ROUNDING)

    def forward(self, tokens: dict[str, Tensor], places_BT: Tensor, last_B: Tensor | None = None) -> dict[str, Tensor]:
        """Values of the states before each response token, and of the state after the last.

        Args:
            tokens: input_ids, attention_mask, position_ids [B, L] of `model_inputs`, or those of `packed_states`.
            places_BT: columns of the response tokens; of packed ones the slots before them.
            last_B: slots of the last tokens of packed sequences, None for padded ones.

        Returns:
            values_BT float32: V at position P − 1 + t, numbers without meaning in padded slots; bootstrap_value_B float32: V at
            position P + len − 1, the last token of the row (NUMERICS §1), without gradient: an input to GAE, never trained on.
        """
        model = self._base
        hidden = getattr(model, model.base_model_prefix)(**tokens, use_cache=False).last_hidden_state
        if last_B is not None:
            states_N = model.score(hidden).flatten().float()
            return {"values_BT": states_N[places_BT], "bootstrap_value_B": states_N[last_B].detach()}
        first = max(tokens["input_ids"].shape[1] - places_BT.shape[1], 1) - 1  # the first state that is read
        states = model.score(hidden[:, first:]).squeeze(-1).float()
        values_BT = states.gather(1, (places_BT - 1 - first).clamp(min=0))
        return {"values_BT": values_BT, "bootstrap_value_B": states[:, -1].detach()}

    def inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """Keyword arguments of `forward` for a batch."""
        if self.packing:
            packed, before_BT, last_B = packed_states(batch, width_step(self), one_row=wants_one_row(self.model))
            return {"tokens": packed, "places_BT": before_BT, "last_B": last_B}
        tokens, places_BT = model_inputs(batch, width_step(self))
        return {"tokens": tokens, "places_BT": places_BT}

    def blank(self) -> SequenceBatch:
        """A batch that counts for nothing."""
        return blank_batch()

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
