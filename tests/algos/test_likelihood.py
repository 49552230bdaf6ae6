"""The likelihood objective is a sum over valid tokens, and nothing else."""

from __future__ import annotations

import torch

from rlhf_dist.algos.likelihood import nll_objective
from rlhf_dist.contracts.experience import SequenceBatch


def test_the_objective_is_the_sum_over_valid_tokens() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    tokens = torch.zeros(2, 2, dtype=torch.long)
    batch = SequenceBatch(tokens, mask, tokens, mask, mask)
    loss, tally = nll_objective({"logprobs_BT": torch.tensor([[-1.0, -2.0], [-3.0, float("nan")]])}, batch)
    assert float(loss) == 6.0 and tally.means() == {"loss": 2.0}


def test_an_empty_microbatch_is_a_zero_with_zero_gradient() -> None:
    mask, tokens = torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    logprobs = torch.tensor([[float("nan"), -1.0]], requires_grad=True)
    loss, tally = nll_objective({"logprobs_BT": logprobs}, SequenceBatch(tokens, mask, tokens, mask, mask))
    loss.backward()
    assert float(loss.detach()) == 0.0 and logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, 0.0]] and tally.means() == {}
