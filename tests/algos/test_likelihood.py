"""The likelihood objective is a weighted sum over valid tokens, and nothing else."""

from __future__ import annotations

import pytest
import torch

from rlhf_dist.algos.likelihood import nll_objective
from rlhf_dist.contracts.demonstrations import DemonstrationBatch
from rlhf_dist.contracts.experience import SequenceBatch


def test_the_objective_is_the_sum_over_valid_tokens() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    tokens = torch.zeros(2, 2, dtype=torch.long)
    logprobs = {"logprobs_BT": torch.tensor([[-1.0, -2.0], [-3.0, float("nan")]])}
    loss, tally = nll_objective(logprobs, DemonstrationBatch(tokens, mask, tokens, mask, mask, torch.ones(2)))
    assert float(loss) == 6.0 and tally.means() == {"loss": 2.0}
    loss, tally = nll_objective(logprobs, DemonstrationBatch(tokens, mask, tokens, mask, mask, torch.tensor([0.5, 2.0])))
    assert float(loss) == 7.5 and tally.means() == {"loss": 2.5}, "three nats at weight ½ on two tokens, three at weight 2 on one"


def test_a_batch_without_weights_is_refused() -> None:
    mask, tokens = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(TypeError, match="SequenceBatch has no weights"):
        nll_objective({"logprobs_BT": torch.zeros(1, 2)}, SequenceBatch(tokens, mask, tokens, mask, mask))


def test_an_empty_microbatch_is_a_zero_with_zero_gradient() -> None:
    mask, tokens = torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    logprobs = torch.tensor([[float("nan"), -1.0]], requires_grad=True)
    loss, tally = nll_objective({"logprobs_BT": logprobs}, DemonstrationBatch(tokens, mask, tokens, mask, mask, torch.ones(1)))
    loss.backward()
    assert float(loss.detach()) == 0.0 and logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, 0.0]] and tally.means() == {}
