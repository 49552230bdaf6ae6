"""Losses of reward models: pairs, rankings of K answers, soft labels (NUMERICS section 4).

Losses are [B], one a pair or a prompt, with gradient; callers sum them and divide by the global number of prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rlhf_dist.algos.masking import masked


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None, centring: float = 0.0) -> Tensor:
    """−log σ(r_c − r_r − margin) + c·(r_c + r_r)², float [B] (Bradley and Terry 1952; margins as in arXiv 2307.09288).

    Args:
        chosen_B, rejected_B: scores.
        margin_B: how much better the chosen answer was said to be, in score units.
        centring: c, which holds the scores near 0 (only their difference is identified; arXiv 2312.09244).
    """
    difference_B = chosen_B - rejected_B
    if margin_B is not None:
        difference_B = difference_B - margin_B
    loss_B = -logsigmoid(difference_B)
    return loss_B + centring * (chosen_B + rejected_B).square() if centring else loss_B


def all_pairs(scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """Bradley–Terry over the C(K, 2) pairs of a ranking, averaged, float [B] (Ouyang et al. 2022, arXiv 2203.02155).

    Args:
        scores_BK: scores of the answers, best first.
        mask_BK: answers that exist; prompts may have different numbers of them.

    Raises:
        ValueError: a prompt with fewer than two answers.
    """
    scores_BK = _checked(scores_BK, mask_BK)
    better_first = torch.ones(2 * (scores_BK.shape[1],), dtype=torch.bool, device=scores_BK.device).triu(1)
    pairs_BKK = mask_BK.unsqueeze(2) & mask_BK.unsqueeze(1) & better_first
    losses_BKK = -logsigmoid(scores_BK.unsqueeze(2) - scores_BK.unsqueeze(1))
    return masked(losses_BKK, pairs_BKK).sum((1, 2)) / pairs_BKK.sum((1, 2))


def plackett_luce(scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """−Σ_k [s_k − logsumexp(s_k … s_K)]: the ranking as successive choices of the best that is left, float [B] (Plackett 1975).

    Args, raises: as `all_pairs`.
    """
    scores_BK = _checked(scores_BK, mask_BK)
    not_better = torch.ones(2 * (scores_BK.shape[1],), dtype=torch.bool, device=scores_BK.device).triu()
    left_BKK = mask_BK.unsqueeze(1) & not_better
    # The least finite number, not −inf: where nothing is left, even the gradient that is thrown away must not be NaN (anomaly detection).
    candidates_BKK = masked(scores_BK.unsqueeze(1).expand_as(left_BKK), left_BKK, torch.finfo(scores_BK.dtype).min)
    return masked(candidates_BKK.logsumexp(2) - scores_BK, mask_BK).sum(1)


def soft_label(score_a_B: Tensor, score_b_B: Tensor, preference_B: Tensor) -> Tensor:
    """Binary cross-entropy of r_a − r_b against the probability that a is better, float [B] (AI feedback, arXiv 2309.00267).

    Raises:
        ValueError: a preference outside [0, 1], NaN included.
    """
    if not bool(((preference_B >= 0) & (preference_B <= 1)).all()):
        raise ValueError("a soft label is a probability in [0, 1]")
    return binary_cross_entropy_with_logits(score_a_B - score_b_B, preference_B, reduction="none")


def _checked(scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
    answers_B = mask_BK.sum(1)
    if bool((answers_B < 2).any()):
        raise ValueError(f"{int((answers_B < 2).sum())} of {len(answers_B)} prompts have fewer than two ranked answers")
    return masked(scores_BK, mask_BK)
