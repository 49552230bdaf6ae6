"""The module inside a policy or reference engine: a causal LM that answers with log-probabilities of the response tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.head import is_plain, logprobs_in_head, wants_one_row
from rlhf_dist.models.inputs import blank_batch, model_inputs, response_slots, width_step
from rlhf_dist.models.logprobs import HeadOptions, logprobs_and_entropy
from rlhf_dist.models.packing import head_at, packed_inputs, refuse_leaks, three_sequences


class PolicyModule(nn.Module):
    """Wraps a Hugging Face (or peft) causal LM.

    Args:
        model: the causal LM.
        options: the τ of sampling, in every log-probability; whether the entropy is trained on.
        packing: put several sequences in one row (`models.packing`); what comes out is the same up to rounding.

    Raises:
        UserError: packing, and an architecture in which packed sequences see each other.
    """

    def __init__(self, model: nn.Module, options: HeadOptions | None = None, *, packing: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.options = options or HeadOptions()
        self.packing = packing
        self._plain_head = is_plain(model)
        if packing:
            refuse_leaks(self, lambda: self.inputs(three_sequences()), "logprobs_BT")

    def forward(
        self, tokens: dict[str, Tensor], places_BT: Tensor, slots_N: Tensor | None = None, adapter: bool = True
    ) -> dict[str, Tensor]:
        """Log-probabilities and entropies at the response positions.

        Args:
            tokens: input_ids, attention_mask, position_ids [B, L] of `model_inputs`, or those of `packed_inputs`.
            places_BT: of each response token its number in slots_N, or its column where slots_N is None.
            slots_N: slots of the response tokens in the flattened rows; None where the head gives other numbers than the logits, so
                that it must be asked through the model.
            adapter: False for the model without its LoRA adapter.

        Returns:
            logprobs_BT, entropy_BT: float32, nats. Padded slots hold numbers of other slots, which mean nothing.
        """
        with self._adapter(adapter):
            values = self._columns(tokens, places_BT) if slots_N is None else self._slots(tokens, places_BT, slots_N)
        return dict(zip(("logprobs_BT", "entropy_BT"), values, strict=True))

    def _columns(self, tokens: dict[str, Tensor], places_BT: Tensor) -> tuple[Tensor, ...]:
        """The head runs on the columns before those in which some row has a response token: the logits of a column predict the next."""
        length = tokens["input_ids"].shape[1]
        first = max(length - places_BT.shape[1], 1)  # the first column that is predicted
        output = self.model(**tokens, use_cache=False, logits_to_keep=length - first + 1)
        per_column = logprobs_and_entropy(output.logits[:, first - length - 1 : -1], tokens["input_ids"][:, first:], self.options)
        return tuple(column.gather(1, (places_BT - first).clamp(min=0)) for column in per_column)

    def _slots(self, tokens: dict[str, Tensor], places_BT: Tensor, slots_N: Tensor) -> tuple[Tensor, ...]:
        """The head runs on the slots before the response tokens, and on no others."""
        targets_N = tokens["input_ids"].flatten()[slots_N]
        if self._too_large(len(slots_N)):
            per_slot = self._streamed(tokens, slots_N - 1, targets_N)
        else:
            with head_at(self.model, slots_N - 1):
                logits_1NV = self.model(**tokens, use_cache=False).logits
            per_slot = logprobs_and_entropy(logits_1NV[0], targets_N, self.options)
        return tuple(nn.functional.pad(values_N, (0, 1))[places_BT] for values_N in per_slot)

    def _streamed(self, tokens: dict[str, Tensor], slots_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        with logprobs_in_head(self.model, slots_N, targets_N, options.temperature, options.entropy_grad):
            logprobs_N, entropy_N = self.model(**tokens, use_cache=False).logits[0].unbind(-1)
        return logprobs_N, entropy_N if options.entropy_grad else entropy_N.detach()

    def _too_large(self, columns: int) -> bool:
        return self._plain_head and columns * self.model.get_output_embeddings().out_features * 4 > self.options.logits_bytes

    def inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """Keyword arguments of `forward` for a batch."""
        if self.packing:
            packed, slots_N, numbers_BT = packed_inputs(batch, width_step(self), one_row=wants_one_row(self.model))
            return {"tokens": packed, "places_BT": numbers_BT, "slots_N": slots_N}
        tokens, places_BT = model_inputs(batch, width_step(self))
        if not self._plain_head:
            return {"tokens": tokens, "places_BT": places_BT}
        slots_N, numbers_BT = response_slots(batch, tokens, places_BT)
        return {"tokens": tokens, "places_BT": numbers_BT, "slots_N": slots_N}

    def blank(self) -> SequenceBatch:
        """A batch that counts for nothing."""
        return blank_batch()

    def _adapter(self, on: bool) -> AbstractContextManager[Any]:
        return nullcontext() if on else self.model.disable_adapter()  # type: ignore[no-any-return]
