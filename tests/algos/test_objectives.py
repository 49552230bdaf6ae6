"""Objectives: loss and metrics against plain references, and independence of how a batch was cut (law 2, the part that is pure maths)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.losses import denominator
from rlhf_dist.algos.objectives import PolicyObjective, ValueObjective
from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.contracts.experience import ExperienceBatch, SequenceBatch
from rlhf_dist.contracts.tally import merged

REDUCTIONS = ["token_mean", "sequence_mean", "fixed"]


def experience(mask: torch.Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> ExperienceBatch:
    rows, width = mask.shape
    generator = torch.Generator().manual_seed(seed)
    floats = {
        name: torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
        for name in ("rollout_logprobs_BT", "old_logprobs_BT", "ref_logprobs_BT", "values_BT", "advantages_BT", "returns_BT")
    }
    whole = torch.zeros(rows, dtype=torch.long)
    return ExperienceBatch(
        prompt_tokens_BP=torch.ones(rows, 1, dtype=torch.long),
        prompt_mask_BP=torch.ones(rows, 1, dtype=torch.bool),
        response_tokens_BT=torch.ones(rows, width, dtype=torch.long),
        response_mask_BT=mask,
        response_attention_BT=torch.ones(rows, width, dtype=torch.bool),
        prompt_id_B=whole,
        sample_index_B=whole,
        policy_version_B=whole,
        stop_reason_B=whole,
        prompts=("",) * rows,
        completions=("",) * rows,
        **floats,
    )


def mask_of(seed: int, rows: int = 6, width: int = 5) -> torch.Tensor:
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0, 0] = True
    return mask


def outputs(batch: ExperienceBatch, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(batch.response_mask_BT.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    made = {
        "logprobs_BT": batch.old_logprobs_BT + 0.3 * noise[0],
        "entropy_BT": noise[1].abs(),
        "values_BT": batch.values_BT + 0.3 * noise[2],
    }
    return {name: x.detach().requires_grad_() for name, x in made.items()}


def test_policy_loss_and_metrics_against_a_loop_over_tokens():
    batch = experience(mask_of(0))
    out = outputs(batch)
    loss, tally = PolicyObjective(AlgorithmSection(clip_low=0.1, clip_high=0.3, entropy_coef=0.01))(out, batch)
    mask = batch.response_mask_BT
    ratio = (out["logprobs_BT"] - batch.old_logprobs_BT)[mask].exp()
    advantages, entropy = batch.advantages_BT[mask], out["entropy_BT"][mask]
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.9, 1.3)
    surrogate = torch.maximum(plain, clipped)
    torch.testing.assert_close(loss, (surrogate - 0.01 * entropy).sum())
    want = {
        "loss/policy_avg": surrogate.mean(),
        "policy/approxkl_avg": 0.5 * ratio.log().square().mean(),
        "policy/clipfrac_avg": (clipped > plain).double().mean(),
        "policy/entropy_avg": entropy.mean(),
        "val/ratio": ratio.mean(),
        "val/ratio_mean_deviation": (ratio - 1).abs().mean(),
        "val/ratio_max_deviation": (ratio - 1).abs().max(),
    }
    means = tally.means()
    assert set(means) == set(want)
    for name, value in want.items():
        assert means[name] == pytest.approx(value.item()), name
    assert set(tally.weights.values()) == {float(mask.sum())}
    assert 0 < means["policy/clipfrac_avg"] < 1


def test_importance_weights_scale_the_surrogate_of_each_token_and_nothing_else():
    batch = experience(mask_of(0))
    out = outputs(batch)
    config = AlgorithmSection(entropy_coef=0.01)
    plain, weighted = PolicyObjective(config)(out, batch), PolicyObjective(config, 1.5)(out, batch)
    mask = batch.response_mask_BT
    weights = (batch.old_logprobs_BT - batch.rollout_logprobs_BT)[mask].exp().clamp(max=1.5)
    ratio, advantages = (out["logprobs_BT"] - batch.old_logprobs_BT)[mask].exp(), batch.advantages_BT[mask]
    surrogate = weights * torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    torch.testing.assert_close(weighted[0], (surrogate - 0.01 * out["entropy_BT"][mask]).sum())
    changed = {"loss/policy_avg": pytest.approx(surrogate.mean().item())}
    assert weighted[1].means() == plain[1].means() | changed, "the ratio is still against the old policy"
    assert 0 < (weights == 1.5).double().mean() < 1


def test_value_loss_and_metrics_against_a_loop_over_tokens():
    batch = experience(mask_of(1))
    out = outputs(batch)
    loss, tally = ValueObjective(AlgorithmSection(value_clip=0.1))(out, batch)
    mask = batch.response_mask_BT
    v, old, r = out["values_BT"][mask], batch.values_BT[mask], batch.returns_BT[mask]
    plain, clipped = (v - r) ** 2, (torch.clamp(v, old - 0.1, old + 0.1) - r) ** 2
    torch.testing.assert_close(loss, 0.5 * torch.maximum(plain, clipped).sum())
    assert tally.means() == {
        "loss/value_avg": pytest.approx(loss.item() / int(mask.sum())),
        "val/clipfrac_avg": pytest.approx((clipped > plain).double().mean().item()),
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_minibatch_identities(reduction):
    batch = experience(mask_of(2))
    out = outputs(batch) | {"logprobs_BT": batch.old_logprobs_BT.clone().requires_grad_()}
    means = PolicyObjective(AlgorithmSection(reduction=reduction))(out, batch)[1].means()
    assert means["val/ratio"] == 1.0 and means["val/ratio_max_deviation"] == means["val/ratio_mean_deviation"] == 0.0
    assert means["policy/clipfrac_avg"] == 0.0 and means["policy/approxkl_avg"] == 0.0
    rows = [batch.advantages_BT[b][m] for b, m in enumerate(batch.response_mask_BT) if m.any()]
    mean = torch.stack([row.mean() for row in rows]).mean() if reduction == "sequence_mean" else torch.cat(rows).mean()
    assert means["loss/policy_avg"] == pytest.approx(-mean.item(), rel=1e-6)


def test_entropy_is_left_out_of_the_loss_by_default_and_raised_when_asked_for():
    batch = experience(mask_of(3))
    out = outputs(batch)
    loss, _ = PolicyObjective(AlgorithmSection())(out, batch)
    assert torch.autograd.grad(loss, out["entropy_BT"], allow_unused=True)[0] is None
    loss, _ = PolicyObjective(AlgorithmSection(entropy_coef=0.5))(out, batch)
    assert torch.equal(torch.autograd.grad(loss, out["entropy_BT"])[0], torch.where(batch.response_mask_BT, -0.5, 0.0).double())


@given(st.integers(0, 2**31), st.lists(st.integers(0, 6), max_size=5), st.sampled_from(REDUCTIONS), st.booleans(), st.booleans())
def test_regression_one_gradient_however_the_batch_is_cut(seed, cuts, reduction, policy, weighted):
    """NUMERICS section 7: sums over microbatches (empty ones included) over a global denominator equal the whole batch; metrics too."""
    batch = experience(mask_of(seed), seed)
    out = outputs(batch, seed + 1)
    config = AlgorithmSection(reduction=reduction, entropy_coef=0.01)
    objective = PolicyObjective(config, 2.0 if weighted else None) if policy else ValueObjective(config)
    names = ["logprobs_BT", "entropy_BT"] if policy else ["values_BT"]
    divisor = denominator(batch.valid_tokens_B.tolist(), reduction, 5)
    loss, tally = objective(out, batch)
    want = torch.autograd.grad(loss / divisor, [out[n] for n in names])

    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = [0, *sorted(cuts), 6]
    parts = [order[a:b] for a, b in itertools.pairwise(bounds)]
    pieces = [objective(_rows(out, batch.select(rows), rows), batch.select(rows)) for rows in parts]
    got = torch.autograd.grad(sum(loss / divisor for loss, _ in pieces), [out[n] for n in names])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    means = merged(t for _, t in pieces).means()
    assert means == {name: pytest.approx(value, rel=1e-12, abs=1e-15) for name, value in tally.means().items()}


def _rows(out, batch, rows):
    return {name: x[rows][:, : batch.response_tokens_BT.shape[1]] for name, x in out.items()}


def test_a_mean_of_microbatch_means_would_be_wrong():
    """The mistake itself, to show that the test above can see it."""
    batch = experience(torch.tensor([[True, True, True, True], [True, False, False, False]]))
    out = outputs(batch)
    objective = PolicyObjective(AlgorithmSection())
    whole = objective(out, batch)[0] / 5
    means = [objective(_rows(out, batch.select([b]), [b]), batch.select([b]))[0] / n for b, n in ((0, 4), (1, 1))]
    assert abs(sum(means) / 2 - whole).item() > 1e-3


@pytest.mark.parametrize("kind", [PolicyObjective, ValueObjective])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_empty_microbatch_has_a_zero_loss_that_backward_accepts(kind, rows, reduction):
    batch = experience(torch.zeros(rows, 4, dtype=torch.bool))
    weight = torch.ones(3, requires_grad=True)
    out = {name: torch.full((rows, 4), 1.0, dtype=torch.float64) * weight.sum() for name in ("logprobs_BT", "entropy_BT", "values_BT")}
    loss, tally = kind(AlgorithmSection(reduction=reduction, entropy_coef=0.1))(out, batch)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(weight.grad, torch.zeros(3))
    assert tally.means() == {}


def test_config_stops_at_the_constructor_and_what_is_missing_is_named():
    batch = experience(mask_of(4))
    with pytest.raises(ValueError, match="old_logprobs_BT"):
        PolicyObjective(AlgorithmSection())(outputs(batch), batch.replace(old_logprobs_BT=None))
    with pytest.raises(ValueError, match="returns_BT"):
        ValueObjective(AlgorithmSection())(outputs(batch), batch.replace(returns_BT=None))
    bare = SequenceBatch(
        batch.prompt_tokens_BP, batch.prompt_mask_BP, batch.response_tokens_BT, batch.response_mask_BT, batch.response_attention_BT
    )
    with pytest.raises(TypeError, match="SequenceBatch"):
        PolicyObjective(AlgorithmSection())(outputs(batch), bare)


@pytest.mark.parametrize("kind", [PolicyObjective, ValueObjective])
def test_metrics_carry_no_gradient_and_bf16_outputs_are_accepted(kind):
    batch = experience(mask_of(5), dtype=torch.float32)
    out = {name: x.detach().to(torch.bfloat16).requires_grad_() for name, x in outputs(batch).items()}
    loss, tally = kind(AlgorithmSection())(out, batch)
    assert loss.dtype == torch.float32 and loss.requires_grad
    assert all(isinstance(value, float) for value in tally.means().values())
