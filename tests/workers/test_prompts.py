"""Prompts by request, and a sampler that answers for one version alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import GenerateRequest, RolloutInfo
from rlhf_dist.workers.prompts import Prompts, VersionedSampler

Configured = Callable[..., PPOConfig]


@pytest.fixture
def prompts_of(configured: Configured, tiny_model: Path) -> Callable[..., Prompts]:
    def make(changes: dict[str, Any] | None = None) -> Prompts:
        return Prompts(configured(changes), AutoTokenizer.from_pretrained(tiny_model))

    return make


def request(start: int, count: int, **options: Any) -> GenerateRequest:
    given = {"stream": "train", "step": 0, "step_start": 0, "samples_per_prompt": 1, "version": 0} | options
    return GenerateRequest(**given, start=start, count=count)


class Sampler:
    """Answers with the texts of the prompts; remembers those before them."""

    def sample(self, asked: GenerateRequest, before: list[Any], mine: list[Any]) -> Stored[Any, RolloutInfo]:
        rows = len(mine)
        self.before = [record.text for record in before]
        batch = Batch(tuple(record.text for record in mine), torch.zeros(rows, 1))
        return Stored(batch, RolloutInfo((0,) * rows, (0,) * rows, (1,) * rows, (1,) * rows, (0,) * rows, (asked.version,) * rows, 0.0))


class Batch:
    def __init__(self, prompts: tuple[str, ...], rollout: torch.Tensor, old: torch.Tensor | None = None) -> None:
        self.prompts, self.rollout_logprobs_BT, self.old_logprobs_BT = prompts, rollout, old

    def replace(self, old_logprobs_BT: torch.Tensor) -> Batch:
        return Batch(self.prompts, self.rollout_logprobs_BT, old_logprobs_BT)


def texts(records: list[Any]) -> list[str]:
    return [record.text for record in records]


def test_a_request_in_the_middle_of_a_step_knows_what_comes_before_it(prompts_of: Callable[..., Prompts]) -> None:
    whole = prompts_of().of(request(0, 6))
    assert whole[0] == [] and len(whole[1]) == 6
    before, mine = prompts_of().of(request(4, 2))
    assert texts(before + mine) == texts(whole[1])


def test_a_later_step_goes_on_where_the_one_before_ends(prompts_of: Callable[..., Prompts]) -> None:
    prompts = prompts_of()
    ahead = prompts.of(request(8, 2, step=1, step_start=8))[1]  # asked before the first step is done with
    assert texts(prompts.of(request(0, 10))[1])[8:] == texts(ahead)


def test_held_out_prompts_are_their_own_stream_and_their_fates_are_counted(prompts_of: Callable[..., Prompts]) -> None:
    prompts = prompts_of()
    assert texts(prompts.of(request(1, 2, stream="eval"))[1]) == texts(prompts.held_out[1:3])
    assert set(texts(prompts.held_out)).isdisjoint(texts(prompts.of(request(0, 100))[1])) and prompts.held_out_fates == {}
    assert prompts_of({"data.eval_fraction": 0.0}).held_out == []
    cut = prompts_of({"data.max_prompt_tokens": 3, "data.overlong": "drop"})
    assert cut.held_out_fates["held_out_dropped"] > 0 and all(len(record.tokens) <= 3 for record in cut.held_out)


@pytest.mark.parametrize("old", ["recompute", "sampler"])
def test_a_sampler_answers_for_the_version_it_holds(old: str, configured: Configured, prompts_of: Callable[..., Prompts]) -> None:
    versioned = VersionedSampler(prompts_of(), Sampler(), configured({"algorithm.old_logprobs": old}), "rollout rank 3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="policy version 0, but the sampler holds -1") as caught:
        versioned.generate(request(0, 2))
    assert caught.value.where == "rollout rank 3, generate"
    versioned.version = 7
    answer = versioned.generate(request(0, 2, version=7))
    assert answer.info.versions == (7, 7) and (answer.payload.old_logprobs_BT is not None) == (old == "sampler")


def test_what_was_dropped_before_a_prompt_is_counted_where_the_prompt_is(
    configured: Configured, prompts_of: Callable[..., Prompts]
) -> None:
    changes = {"data.max_prompt_tokens": 4, "data.overlong": "drop"}
    prompts = prompts_of(changes)
    versioned = VersionedSampler(prompts, Sampler(), configured(changes), "x")  # type: ignore[arg-type]
    versioned.version = 0
    infos = [versioned.generate(request(start, 5)).info for start in (0, 5)]
    dropped = [sum(record.skipped for record in prompts.of(request(start, 5))[1]) for start in (0, 5)]
    assert [info.dropped_prompts for info in infos] == dropped and sum(dropped) > 0
