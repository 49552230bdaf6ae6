"""Top-k and top-p without the full sort: the same tokens as with it, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.rollout import sampling
from rlhf_dist.rollout.filters import PREFILTER, nucleus, ranked, wider_than
from rlhf_dist.rollout.sampling import SamplingParams, draw

# Few distinct values, so that ties are everywhere, also at every cut.
WEIGHTS = st.lists(st.sampled_from([0.0, 2.0**-70, 0.1, 0.125, 0.3, 1.0]), min_size=1, max_size=60)


@settings(deadline=None)
@given(values=WEIGHTS, data=st.data())
def test_ranked_is_the_head_of_a_stable_full_sort(values: list[float], data: st.DataObject) -> None:
    weights, count = torch.tensor([values, values[::-1]]), data.draw(st.integers(1, len(values)))
    expected, index = torch.sort(weights, dim=-1, descending=True, stable=True)
    found, places = ranked(weights, count)
    assert torch.equal(found, expected[:, :count]) and torch.equal(places, index[:, :count])


@settings(deadline=None)
@given(values=WEIGHTS.filter(any), top_p=st.floats(0.01, 0.999))
def test_the_nucleus_is_the_shortest_head_that_reaches_the_mass(values: list[float], top_p: float) -> None:
    total = torch.tensor([[sum(values)]])
    head, _ = ranked(torch.tensor([values]), len(values))
    kept = nucleus(head, top_p, total)[0].count_nonzero().item()
    ordered = sorted(values, reverse=True)
    slack = 1e-5 * sum(values)
    assert sum(ordered[:kept]) >= top_p * sum(values) - slack and sum(ordered[: kept - 1]) < top_p * sum(values) + slack


def kept(weights: torch.Tensor, top_p: float, first: int) -> list[set[int]]:
    """The kept tokens of every row when `first` candidates are looked at first."""
    total = weights.sum(-1, keepdim=True)
    sets = []
    for row in range(len(weights)):
        head, places = ranked(weights[row : row + 1], first)
        if wider_than(head, top_p, total[row : row + 1]).any():
            head, places = ranked(weights[row : row + 1], weights.shape[1])
        sets.append(set(places[nucleus(head, top_p, total[row : row + 1]) > 0].tolist()))
    return sets


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), sharpness=st.sampled_from([0.1, 1.0, 3.0, 8.0]), top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 0.9999]))
def test_the_prefilter_keeps_the_tokens_that_the_full_sort_keeps(seed: int, sharpness: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rounded logits: many ties.
    weights = torch.softmax((torch.randn(3, 700, generator=generator) * sharpness).round(decimals=1), -1)
    assert kept(weights, top_p, 64) == kept(weights, top_p, 700)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_draws_are_those_of_the_full_sort_for_sharp_and_flat_rows_together(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.cat([torch.randn(20, 3000) * scale for scale in (0.1, 2.0, 6.0)])
    uniforms = torch.rand(60)
    drawn = draw(logits, uniforms, SamplingParams(1, top_p=top_p))
    alone = [draw(logits[i : i + 1], uniforms[i : i + 1], SamplingParams(1, top_p=top_p)).tokens_N.item() for i in range(60)]
    assert drawn.tokens_N.tolist() == alone
    monkeypatch.setattr(sampling, "PREFILTER", 3000)
    full = draw(logits, uniforms, SamplingParams(1, top_p=top_p))
    assert drawn.kept_mass_N is not None and full.kept_mass_N is not None
    assert torch.equal(drawn.tokens_N, full.tokens_N) and torch.allclose(drawn.kept_mass_N, full.kept_mass_N, atol=1e-6)
    widths = [len(tokens) for tokens in kept(torch.softmax(logits, -1), top_p, 3000)]
    assert min(widths) < PREFILTER < max(widths)
