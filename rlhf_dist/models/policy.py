"""The module inside a policy or reference engine: a causal LM that answers with log-probabilities of the response tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.inputs import blank_batch, model_inputs
from rlhf_dist.models.logprobs import HeadOptions, logprobs_and_entropy


class PolicyModule(nn.Module):
    """Wraps a Hugging Face (or peft) causal LM.

    Args:
        model: the causal LM.
        options: the τ of sampling, in every log-probability; whether the entropy is trained on.
    """

    def __init__(self, model: nn.Module, options: HeadOptions | None = None) -> None:
        super().__init__()
        self.model = model
        self.options = options or HeadOptions()

    def forward(self, tokens: dict[str, Tensor], response_tokens_BT: Tensor, adapter: bool = True) -> dict[str, Tensor]:
        """Log-probabilities and entropies at the response positions.

        The head runs on the last T + 1 positions only; the logit at position P − 1 + t predicts response token t.

        Returns:
            logprobs_BT, entropy_BT: float32, nats. Padded slots hold finite numbers that mean nothing.
        """
        width = response_tokens_BT.shape[1]
        with self._adapter(adapter):
            output: Any = self.model(**tokens, use_cache=False, logits_to_keep=width + 1)
        logprobs_BT, entropy_BT = logprobs_and_entropy(output.logits[:, -width - 1 : -1], response_tokens_BT, self.options)
        return {"logprobs_BT": logprobs_BT, "entropy_BT": entropy_BT}

    def inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """Keyword arguments of `forward` for a batch."""
        return {"tokens": model_inputs(batch), "response_tokens_BT": torch.where(batch.response_attention_BT, batch.response_tokens_BT, 0)}

    def blank(self) -> SequenceBatch:
        """A batch that counts for nothing."""
        return blank_batch()

    def _adapter(self, on: bool) -> Any:
        return nullcontext() if on else self.model.disable_adapter()
