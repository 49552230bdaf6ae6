"""Inverse-CDF sampling: the right token for every u, the right log-probability, filters, faults."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.rollout.sampling import BLOCK, SamplingParams, choose, draw

PLAIN = SamplingParams(max_new_tokens=1)


def spread(count: int) -> torch.Tensor:
    """`count` evenly spaced numbers inside (0, 1)."""
    return (torch.arange(count) + 0.5) / count


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK, 2 * BLOCK + 1, 1000, 1024, 32000])
def test_choose_is_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    torch.manual_seed(0)
    weights = torch.softmax(torch.randn(1, vocabulary) * 2, -1)
    u = spread(4001)
    cdf = weights[0].double().cumsum(0)
    expected = torch.searchsorted(cdf, u.double() * cdf[-1], right=True)
    chosen = choose(weights.expand(len(u), -1), u)
    # A u that falls on a boundary may go either way; then the boundary is where the distance to the running sum is rounding.
    differs = chosen != expected
    assert differs.float().mean() < 0.002
    lower, upper = torch.minimum(chosen, expected)[differs], torch.maximum(chosen, expected)[differs]
    assert bool(((cdf[upper] - cdf[lower]) < 2e-5).all() | ((cdf[lower] - u.double()[differs]).abs() < 2e-6).all())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocabulary=st.sampled_from([3, 40, 513, 700, 1025]))
def test_a_weight_of_zero_is_never_chosen(data: st.DataObject, vocabulary: int) -> None:
    alive = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=4, unique=True))
    weights = torch.zeros(1, vocabulary)
    weights[0, alive] = torch.tensor(data.draw(st.lists(st.floats(2.0**-66, 2.0**10, width=32), min_size=len(alive), max_size=len(alive))))
    u = torch.cat([spread(64), torch.tensor([2.0**-24, 1 - 2.0**-24])])
    assert set(choose(weights.expand(len(u), -1), u).tolist()) <= set(alive)


def test_frequencies_match_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 700)
    u = spread(200_000)
    counts = torch.bincount(draw(logits.expand(len(u), -1), u, SamplingParams(1, temperature=0.7)).tokens_N, minlength=700)
    assert torch.allclose(counts / len(u), torch.softmax(logits[0] / 0.7, -1), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [PLAIN, SamplingParams(1, temperature=0.6), SamplingParams(1, temperature=2.0, top_k=5, top_p=0.8)])
def test_logprobs_are_of_the_unfiltered_distribution_at_the_temperature(params: SamplingParams, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(50, 1000) * 5).to(dtype)
    drawn = draw(logits, spread(50), params)
    expected = (logits.float() / params.temperature).log_softmax(-1).gather(1, drawn.tokens_N[:, None])[:, 0]
    assert torch.allclose(drawn.logprobs_N, expected, atol=2e-6, rtol=1e-6)


def test_top_k_keeps_k_tokens_and_reports_their_mass() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    u = spread(1000)
    drawn = draw(probs.log().expand(1000, -1), u, SamplingParams(1, top_k=2))
    assert drawn.kept_mass_N is not None and torch.allclose(drawn.kept_mass_N, torch.tensor(0.7))
    assert torch.bincount(drawn.tokens_N, minlength=4).tolist() == [0, 571, 0, 429]


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for top_p, kept, mass in ((0.39, {1}, 0.4), (0.6, {1, 3}, 0.7), (0.75, {1, 2, 3}, 0.9), (0.95, {0, 1, 2, 3}, 1.0)):
        drawn = draw(probs.log().expand(100, -1), spread(100), SamplingParams(1, top_p=top_p))
        assert set(drawn.tokens_N.tolist()) == kept
        assert drawn.kept_mass_N is not None and torch.allclose(drawn.kept_mass_N, torch.tensor(mass))


def test_top_p_looks_at_what_top_k_left() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    drawn = draw(probs.log().expand(100, -1), spread(100), SamplingParams(1, top_k=2, top_p=0.56))
    assert set(drawn.tokens_N.tolist()) == {1}  # 0.4 of 0.7 is 57 %


def test_without_filters_there_is_no_kept_mass() -> None:
    assert draw(torch.zeros(2, 4), spread(2), PLAIN).kept_mass_N is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [PLAIN, SamplingParams(1, top_k=2), SamplingParams(1, top_p=0.9)])
@pytest.mark.parametrize("vocabulary", [10, 1000])
def test_logits_that_are_not_finite_give_no_token(bad: float, params: SamplingParams, vocabulary: int) -> None:
    logits = torch.zeros(3, vocabulary)
    logits[1, 7] = bad
    tokens = draw(logits, spread(3), params).tokens_N.tolist()
    assert tokens[1] == -1 and tokens[0] >= 0 and tokens[2] >= 0


def test_minus_infinity_forbids_a_token_and_all_of_them_give_none() -> None:
    logits = torch.full((20, 600), float("-inf"))
    logits[:10, 3] = 1.0
    tokens = draw(logits, spread(20), PLAIN).tokens_N.tolist()
    assert tokens == [3] * 10 + [-1] * 10


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop_strings": ("",)}, "stop_strings"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes: dict, name: str) -> None:
    with pytest.raises(UserError, match=name):
        SamplingParams(**{"max_new_tokens": 1, **changes})
