"""Law 1: what stands in a masked slot changes no result, no gradient and no metric, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rlhf_dist.algos.advantages import broadcast_to_tokens, gae
from rlhf_dist.algos.dpo_objective import DPOObjective
from rlhf_dist.algos.likelihood import nll_objective
from rlhf_dist.algos.losses import PolicyClip, policy_loss, token_weights, value_loss
from rlhf_dist.algos.masking import masked_mean, masked_sum
from rlhf_dist.algos.objectives import PolicyObjective, ValueObjective
from rlhf_dist.algos.preference import sequence_log_ratio, sigmoid_loss
from rlhf_dist.algos.ranking import all_pairs, plackett_luce
from rlhf_dist.algos.reward_objective import RewardObjective
from rlhf_dist.algos.token_rewards import sequence_returns, token_rewards
from rlhf_dist.algos.whitening import masked_moments, whiten
from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.config.dpo import DPOSection
from rlhf_dist.contracts.demonstrations import DemonstrationBatch
from rlhf_dist.contracts.experience import ExperienceBatch, SequenceBatch
from rlhf_dist.contracts.pairs import PairBatch
from rlhf_dist.contracts.preferences import PreferenceBatch
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.models.reward_model import RewardModelModule
from rlhf_dist.models.value import ValueModule

POISONS = [1e6, float("nan"), float("inf"), float("-inf"), -1e30]
ROWS, WIDTH, FIELDS = 5, 7, 6
CLIP = PolicyClip(0.2, 0.2, dual=3.0)

# Gaps inside, pads at the end, an untouched row, and a row with no valid token at all.
MASK = torch.tensor(
    [
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
RANKED = MASK[:4]  # preference and ranking losses refuse an empty row

Case = Callable[[list[Tensor], Tensor], Tensor]


def experience(fields: list[Tensor], mask: Tensor) -> ExperienceBatch:
    whole, rows = torch.zeros(len(mask), dtype=torch.long), len(mask)
    return ExperienceBatch(
        prompt_tokens_BP=torch.ones(rows, 1, dtype=torch.long),
        prompt_mask_BP=torch.ones(rows, 1, dtype=torch.bool),
        response_tokens_BT=torch.ones(mask.shape, dtype=torch.long),
        response_mask_BT=mask,
        response_attention_BT=torch.ones_like(mask),
        prompt_id_B=whole,
        sample_index_B=whole,
        policy_version_B=whole,
        stop_reason_B=whole,
        rollout_logprobs_BT=fields[0],
        prompts=("",) * rows,
        completions=("",) * rows,
        old_logprobs_BT=fields[1],
        ref_logprobs_BT=fields[0],
        values_BT=fields[1],
        advantages_BT=fields[2],
        returns_BT=fields[3],
    )


def _with_metrics(loss: Tensor, metrics: dict[str, float]) -> Tensor:
    """Loss and metrics in one tensor, so that all of them are compared bit for bit."""
    return torch.cat([loss.double().view(1), torch.tensor([metrics[name] for name in sorted(metrics)], dtype=torch.float64)])


def _policy(config: AlgorithmSection, importance_cap: float | None = None) -> Case:
    def case(x: list[Tensor], mask: Tensor) -> Tensor:
        loss, tally = PolicyObjective(config, importance_cap)({"logprobs_BT": x[4], "entropy_BT": x[5]}, experience(x, mask))
        return _with_metrics(loss, tally.means())

    return case


def _value(config: AlgorithmSection) -> Case:
    def case(x: list[Tensor], mask: Tensor) -> Tensor:
        loss, tally = ValueObjective(config)({"values_BT": x[4]}, experience(x, mask))
        return _with_metrics(loss, tally.means())

    return case


def _likelihood(x: list[Tensor], mask: Tensor) -> Tensor:
    batch = DemonstrationBatch(*list(vars(experience(x, mask)).values())[:5], torch.arange(1.0, len(mask) + 1))
    loss, tally = nll_objective({"logprobs_BT": x[4]}, batch)
    return _with_metrics(loss, tally.means())


def _reward(ranking: Literal["plackett_luce", "all_pairs"]) -> Case:
    """Answers that do not exist point at texts with poisoned scores."""

    def case(x: list[Tensor], mask: Tensor) -> Tensor:
        index, one = torch.arange(4 * WIDTH).reshape(4, WIDTH), torch.ones(4)
        tokens = torch.zeros(4 * WIDTH, 1, dtype=torch.long)
        batch = PreferenceBatch(tokens, tokens.bool(), index, RANKED, one, one * float("nan"), one)
        loss, tally = RewardObjective(ranking, margins=True, centring=0.1)({"score_B": x[0][:4].flatten()}, batch)
        return _with_metrics(loss, tally.means())

    return case


def _dpo(config: DPOSection) -> Case:
    """Two pairs of answers, one with a soft label."""

    def case(x: list[Tensor], mask: Tensor) -> Tensor:
        count, double = len(RANKED), torch.float64
        fields = vars(experience([each[:count] for each in x], RANKED)).values()
        each_pair = torch.tensor([0.8, float("nan")], dtype=double), torch.tensor([1.0, 2.0], dtype=double)
        batch = PairBatch(*list(fields)[:5], -torch.arange(float(count)).double(), *each_pair)
        loss, tally = DPOObjective(config)({"logprobs_BT": x[4][:count]}, batch)
        return _with_metrics(loss, tally.means())

    return case


def _whiten(keep_mean: bool) -> Case:
    return lambda x, mask: whiten(x[0], mask, masked_moments(x[0], mask), keep_mean)


def _chain(x: list[Tensor], mask: Tensor) -> Tensor:
    """Token rewards → whitening → GAE → whitening → policy loss, as a step runs them."""
    rewards = token_rewards(x[4][:, 1], x[0], mask, 0.1)
    rewards = whiten(rewards, mask, masked_moments(rewards, mask), keep_mean=True)
    advantages, _ = gae(rewards, x[1], mask, gamma=0.99, lam=0.95)
    advantages = whiten(advantages, mask, masked_moments(advantages, mask))
    return policy_loss(x[2], x[3], advantages, mask, CLIP).weighted_sum(token_weights(mask, "token_mean"))


CASES: dict[str, Case] = {
    "likelihood": _likelihood,
    "masked_sum": lambda x, mask: masked_sum(x[0], mask),
    "masked_mean": lambda x, mask: masked_mean(x[0], mask),
    "whiten": _whiten(False),
    "whiten_keep_mean": _whiten(True),
    "token_rewards": lambda x, mask: token_rewards(torch.arange(5.0), x[0], mask, 0.1),
    "sequence_returns": lambda x, mask: sequence_returns(torch.arange(5.0), x[0], mask, 0.1),
    "broadcast": lambda x, mask: broadcast_to_tokens(torch.where(mask.any(1), 1.0, x[0][:, 0]), mask),
    "gae": lambda x, mask: torch.stack(gae(x[0], x[1], mask, gamma=0.99, lam=0.95)),
    "gae_bootstrap": lambda x, mask: torch.stack(
        gae(x[0], x[1], mask, gamma=0.99, lam=0.95, bootstrap_B=torch.where(mask.any(1), 1.0, x[2][:, 0]))
    ),
    "policy_loss": lambda x, mask: policy_loss(x[0], x[1], x[2], mask, CLIP).weighted_sum(token_weights(mask, "sequence_mean")),
    "policy_loss_BT": lambda x, mask: policy_loss(x[0], x[1], x[2], mask, CLIP).loss_BT,
    "policy_clipped": lambda x, mask: policy_loss(x[0], x[1], x[2], mask, CLIP).clipped_BT + 0.0 * masked_sum(x[0], mask),
    "value_loss": lambda x, mask: value_loss(x[0], x[1], x[2], mask, 0.2).loss_BT,
    "value_loss_unclipped": lambda x, mask: value_loss(x[0], x[1], x[2], mask, None).loss_BT,
    "value_clipped": lambda x, mask: value_loss(x[0], x[1], x[2], mask, 0.2).clipped_BT + 0.0 * masked_sum(x[0], mask),
    "policy_objective": _policy(AlgorithmSection(entropy_coef=0.01)),
    "policy_objective_sequence_mean": _policy(AlgorithmSection(reduction="sequence_mean", dual_clip=3.0)),
    "policy_objective_fixed": _policy(AlgorithmSection(reduction="fixed", entropy_coef=0.1)),
    "policy_objective_weighted": _policy(AlgorithmSection(dual_clip=3.0), importance_cap=1.5),
    "value_objective": _value(AlgorithmSection()),
    "value_objective_sequence_mean": _value(AlgorithmSection(reduction="sequence_mean", value_clip=None)),
    "chain": _chain,
    "preference": lambda x, mask: sigmoid_loss(sequence_log_ratio(x[0][:4], RANKED, torch.arange(4.0)), 0.1),
    "dpo_objective": _dpo(DPOSection(label_smoothing=0.1)),
    "dpo_objective_ipo": _dpo(DPOSection(loss="ipo")),
    "dpo_objective_robust": _dpo(DPOSection(loss="robust", label_smoothing=0.1)),
    "reward_objective": _reward("plackett_luce"),
    "reward_objective_all_pairs": _reward("all_pairs"),
    "all_pairs": lambda x, mask: all_pairs(x[0][:4], RANKED),
    "plackett_luce": lambda x, mask: plackett_luce(x[0][:4], RANKED),
}


def results(case: Case, poison: float) -> tuple[Tensor, list[Tensor]]:
    """The result of a case, and its gradient in every tensor it was given, with the poison in all masked slots of all of them."""
    generator = torch.Generator().manual_seed(0)
    fields = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(FIELDS)]
    fields = [torch.where(MASK, x, poison).requires_grad_() for x in fields]
    result = case(fields, MASK)
    result.double().square().sum().backward()
    return result.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in fields]


@pytest.fixture(scope="module")
def clean() -> Iterator[dict[str, tuple[Tensor, list[Tensor]]]]:
    yield {name: results(case, 0.0) for name, case in CASES.items()}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", CASES)
def test_poison_in_masked_slots_changes_nothing(name, poison, clean):
    want, want_gradients = clean[name]
    got, got_gradients = results(CASES[name], poison)
    assert torch.isfinite(want).all()
    assert torch.equal(got, want)
    for mine, theirs in zip(got_gradients, want_gradients, strict=True):
        assert torch.equal(mine, theirs)
        assert not mine[~MASK].any()


@pytest.mark.parametrize("name", CASES)
def test_the_cases_do_hear_valid_slots(name, clean):
    """Otherwise the test above would pass for a function that ignores everything."""
    _, gradients = clean[name]
    assert any(gradient.any() for gradient in gradients) or name in ("broadcast", "policy_clipped", "value_clipped")


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("kind", [PolicyObjective, ValueObjective])
def test_a_microbatch_of_nothing_but_poison_is_a_zero(kind, poison):
    fields = [torch.full((2, 3), poison, requires_grad=True) for _ in range(FIELDS)]
    outputs = {"logprobs_BT": fields[4], "entropy_BT": fields[5], "values_BT": fields[4]}
    loss, tally = kind(AlgorithmSection(entropy_coef=0.1))(outputs, experience(fields, torch.zeros(2, 3, dtype=torch.bool)))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(fields[4].grad, torch.zeros(2, 3))
    assert tally.means() == {}


ROWS_OF_TEXT = [([5, 6], [7, 2, 9]), ([8], [9, 10, 11, 12, 13]), ([14, 15, 16, 17, 18], [2]), ([20], [2]), ([21, 22], [23])]
Poisoned = Callable[[int], Any]


def _sequences(junk: int) -> SequenceBatch:
    """Prompts padded on the left, responses on the right, one column more than needed."""
    prompts, responses = ([junk] * (6 - len(p)) + p for p, _ in ROWS_OF_TEXT), (r + [junk] * (6 - len(r)) for _, r in ROWS_OF_TEXT)
    lengths = torch.tensor([[len(p), len(r)] for p, r in ROWS_OF_TEXT])
    mask = torch.arange(6) < lengths[:, 1:]
    return SequenceBatch(torch.tensor(list(prompts)), torch.arange(6) >= 6 - lengths[:, :1], torch.tensor(list(responses)), mask, mask)


def _texts(junk: int) -> PreferenceBatch:
    """The prompts with their responses as texts, in no pair."""
    rows = [p + r for p, r in ROWS_OF_TEXT]
    mask = torch.arange(7) < torch.tensor([len(row) for row in rows])[:, None]
    tokens = torch.tensor([row + [junk] * (7 - len(row)) for row in rows])
    return PreferenceBatch(tokens, mask, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool), *(torch.zeros(0),) * 3)


SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}
MODULES: dict[str, tuple[Any, Any, Poisoned]] = {
    "policy": (AutoModelForCausalLM, PolicyModule, _sequences),
    "value": (AutoModelForSequenceClassification, ValueModule, _sequences),
    "reward": (AutoModelForSequenceClassification, RewardModelModule, _texts),
}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODULES)
def test_what_a_model_reads_in_padded_slots_changes_nothing(name, packing):
    """Outputs, and the gradient in every weight, of the modules that engines hold."""
    kind, make, batch = MODULES[name]
    torch.manual_seed(0)
    module = make(kind.from_config(LlamaConfig(**SIZE, initializer_range=0.5, pad_token_id=0)).eval(), packing=packing)
    seen = []
    for junk in (0, 39, 10**9, -1):
        given = batch(junk)
        module.zero_grad()
        outputs = {
            key: torch.where(given.response_mask_BT, values, 0.0) if key.endswith("_BT") else values
            for key, values in module(**module.inputs(given)).items()
        }
        sum(values.square().sum() for values in outputs.values() if values.requires_grad).backward()
        seen.append([*outputs.values(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert all(torch.isfinite(x).all() and x.any() for x in seen[0])
    assert all(torch.equal(mine, theirs) for other in seen[1:] for mine, theirs in zip(seen[0], other, strict=True))


def test_the_poison_would_be_seen():
    """The usual shortcut, multiplying by the mask, breaks the law: the test has teeth."""
    assert not torch.equal(*(results(lambda x, mask: (x[0] * mask).sum(), p)[0] for p in (0.0, float("nan"))))
