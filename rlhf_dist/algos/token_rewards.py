"""The reward of each token: a KL penalty everywhere, the score at the end (NUMERICS section 1; Ouyang et al. 2022, arXiv 2203.02155)."""

from __future__ import annotations

from torch import Tensor

from rlhf_dist.algos.masking import last_valid, masked


def token_rewards(score_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, coef: float) -> Tensor:
    """r[t] = −β·k1[t] + 1[t = last]·score, 0 in masked slots; float [B, T] in the dtype of `kl_BT`.

    The score stands on the last *valid* token (the stop token itself), never on a pad; the mask may have gaps.
    A row without a valid token has no reward at all.

    Args:
        score_B: sequence reward. A row that is bootstrapped instead passes 0 here.
        kl_BT: k1 per token, in nats.
        mask_BT: valid tokens.
        coef: β.
    """
    at_end_BT = masked(score_B.to(kl_BT.dtype).unsqueeze(1).expand_as(kl_BT), last_valid(mask_BT))
    return at_end_BT - coef * masked(kl_BT, mask_BT)


def sequence_returns(score_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, coef: float) -> Tensor:
    """R = score − β Σ k1: the whole sequence as one action, for the estimators without a critic; float [B] in the dtype of `score_B`."""
    return score_B - coef * masked(kl_BT, mask_BT).sum(1).to(score_B.dtype)
