"""Sides that did the same may be compared, all others are refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from likeness import TOLERANCES, check_did, digest, model_facts, optimizer_facts, special_tokens
from workload import Shape, llama_config

DONE: dict[str, Any] = {
    "did": {
        "rows": 8,
        "special_tokens": 0,
        "prompts": "ab",
        "optimizer_steps": {"policy": 4, "value": 4},
        "minibatches": {"policy": ["a", "b"]},
    },
    "result": {"surprise": 100.0, "policy_loss": 0.5, "policy_gradient": 2.0, "kl": 0.0},
}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("did", "prompts"), "cd", "prompts is 'ab' here and 'cd' there"),
        (("did", "optimizer_steps", "value"), 5, "optimizer_steps.value is 4 here and 5 there"),
        (("did", "minibatches", "policy"), ["b", "a"], "minibatches.policy"),
        (("did", "lr"), [1e-6], "lr is 'not reported' here"),
        (("result", "surprise"), 101.0, "surprise is 100 here and 101 there"),
        (("result", "policy_gradient"), 2.5, "policy_gradient"),
        (("result", "kl"), float("nan"), "kl is 0 here and nan there"),
    ],
)
def test_what_differs_is_refused_by_name(path: tuple[str, ...], value: Any, said: str) -> None:
    theirs = copy.deepcopy(DONE)
    inner = theirs
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match="the two sides did not do the same") as refused:
        check_did(DONE, theirs)
    assert said in str(refused.value)


def test_results_may_differ_by_rounding_and_need_not_be_reported_by_both() -> None:
    theirs = copy.deepcopy(DONE)
    theirs["result"]["policy_gradient"] *= 1 + 0.5 * TOLERANCES["policy_gradient"][0]
    del theirs["result"]["kl"]
    assert check_did(DONE, theirs)
    with pytest.raises(ValueError, match="no result is reported by both"):
        check_did(DONE, theirs | {"result": {}})


def test_results_are_not_compared_where_a_special_token_was_sampled_but_facts_are() -> None:
    mine, theirs = copy.deepcopy(DONE), copy.deepcopy(DONE)
    mine["did"]["special_tokens"] = theirs["did"]["special_tokens"] = special_tokens([(3, 2, 9), (0, 5)])
    assert mine["did"]["special_tokens"] == 2
    theirs["result"]["surprise"] = 300.0
    assert not check_did(mine, theirs)
    theirs["did"]["rows"] = 9
    with pytest.raises(ValueError, match="rows is 8 here and 9 there"):
        check_did(mine, theirs)


def test_a_digest_knows_rows_but_not_their_order() -> None:
    assert digest([[1, 2], [3]]) == digest([(3,), (1, 2)]) != digest([[1], [2, 3]])
    assert digest([[1], [1]]) != digest([[1]])


def test_facts_of_a_model_tell_size_precision_and_weights_apart() -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    one = LlamaForCausalLM(llama_config(Shape(64, 2, 100)))
    facts = model_facts(one)
    assert (facts["hidden"], facts["layers"], facts["words"], facts["dtype"]) == (64, 2, 100, "float32")
    assert facts["parameters"] == sum(parameter.numel() for parameter in one.parameters())
    other = model_facts(LlamaForCausalLM(llama_config(Shape(64, 2, 100))))
    assert other["weights"] != facts["weights"] and other["parameters"] == facts["parameters"]
    assert model_facts(one.bfloat16())["dtype"] == "bfloat16"


def test_facts_of_an_optimizer_name_every_setting_that_its_groups_have() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:]}]
    facts = optimizer_facts(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0).param_groups)
    assert facts == {"betas": "(0.9, 0.95)", "eps": "1e-08", "weight_decay": ["0.0", "0.1"]}
