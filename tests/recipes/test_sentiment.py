"""The sentiment recipe: its openings are fit to be held out from, and its reward likes what a reader would like."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.reward import checked_result
from rlhf_dist.data.prompts import held_out

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "sentiment"
STORIES = Path(__file__).resolve().parents[2] / ".." / "shared" / "models" / "stories260K"


def openings():
    return [json.loads(line) for line in (RECIPE / "openings.jsonl").read_text(encoding="utf-8").splitlines()]


def load_vader():
    pytest.importorskip("vaderSentiment", reason="the recipe's reward needs the package vaderSentiment (extra dev)")
    function = pytest.importorskip("rlhf_dist.rewards.function")
    return function.load_function(f"{RECIPE / 'reward.py'}:vader")


def test_there_are_enough_openings_and_no_two_are_alike():
    prompts = [row["prompt"] for row in openings()]
    assert len(prompts) >= 220 and all(row.keys() == {"prompt"} for row in openings())
    assert len({prompt.lower().rstrip(".!?") for prompt in prompts}) == len(prompts)


def test_openings_are_short_clean_and_varied():
    prompts = [row["prompt"] for row in openings()]
    assert all(3 <= len(prompt.split()) <= 14 and prompt == " ".join(prompt.split()) for prompt in prompts)
    assert all(prompt.isascii() and prompt[0].isupper() and prompt[-1].isalpha() for prompt in prompts)
    beginnings = Counter(" ".join(prompt.split()[:2]) for prompt in prompts)
    assert beginnings.most_common(1)[0][1] <= 0.6 * len(prompts) and len(beginnings) >= 50


def test_openings_fit_the_prompt_limit_of_the_recipe():
    if not STORIES.exists():
        pytest.skip("the model stories260K is not at hand")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    limit = load_config(PPOConfig, RECIPE / "ppo.yaml").data.max_prompt_tokens
    encoded = [tokenizer(row["prompt"])["input_ids"] for row in openings()]
    assert max(map(len, encoded)) <= limit
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)


def test_a_fifth_of_the_openings_is_held_out():
    fraction = load_config(PPOConfig, RECIPE / "ppo.yaml").data.eval_fraction
    assert sum(held_out(row["prompt"], fraction) for row in openings()) == 55


def test_the_reward_keeps_the_contract_and_ranks_as_a_reader_would():
    vader = load_vader()
    completions = ["She was so happy and loved her new friend.", "It was a stone.", "He was sad, hurt and very angry.", ""]
    happy, plain, sad, empty = checked_result("vader", vader(["x"] * 4, completions, answer=[1, 2, 3, 4]), 4, "recipe").values
    assert happy > 0.7 > plain == 0.0 == empty > -0.7 > sad


def test_the_prompt_does_not_count():
    vader = load_vader()
    assert vader(["I love this wonderful day"], ["a stone"]) == vader(["I hate this awful day"], ["a stone"]) == [0.0]
