"""Every recipe in configs/recipes can be started as its page says, and the sentiment recipe's pieces fit together."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.config.rewards import FunctionReward, ModelReward
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.models.classifier import EncodedTexts, load_classifier
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.rewards.function import load_function
from rlhf_dist.rewards.text import same_tokenizer
from rlhf_dist.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "recipes"
SENTIMENT = RECIPES / "sentiment"
KINDS: dict[str, type[BaseModel]] = {
    "sft.yaml": SFTConfig,
    "reward.yaml": RewardModelConfig,
    "dpo.yaml": DPOConfig,
    "ppo.yaml": PPOConfig,
}
MADE_ELSEWHERE = ("runs/", "../shared/", "data/", "models/")  # by an earlier stage or a script, or the user's own: their pages say so


def recipes() -> list[Path]:
    return sorted(RECIPES.rglob("*.yaml"))


def strings(value: Any) -> Iterator[str]:
    """All texts in a nest of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def test_there_are_recipes() -> None:
    named = {path.relative_to(RECIPES).as_posix() for path in recipes()}
    stages = {f"{folder}/{stage}.yaml" for folder in ("chat-7b", "chat-7b/qlora") for stage in ("sft", "reward", "dpo", "ppo")}
    assert named >= {f"quickstart/{stage}.yaml" for stage in ("sft", "reward", "ppo")} | {"sentiment/ppo.yaml"} | stages


@pytest.mark.parametrize("folder", ["quickstart", "chat-7b", "chat-7b/qlora"])
def test_each_stage_of_a_pipeline_feeds_the_next(folder: str) -> None:
    """What a stage names under runs/ is what an earlier one exports."""
    stages = {path.stem: load_config(KINDS[path.name], path).model_dump() for path in (RECIPES / folder).glob("*.yaml")}
    exports = {f"{stage['run']['output_dir']}/{stage['run']['name']}/export/model" for stage in stages.values()}
    exports |= {f"{stage['run']['output_dir']}/task/model" for stage in stages.values()}
    named = [
        text for stage in stages.values() for text in strings({k: v for k, v in stage.items() if k != "run"}) if text.startswith("runs/")
    ]
    models = [text for text in named if "/task/" not in text or text.endswith("/model")]
    assert models and set(models) <= exports
    ppo = stages["ppo"]
    assert ppo["policy"]["model"] == f"{stages['sft']['run']['output_dir']}/sft/export/model"
    assert any(source.get("model", "").endswith("/reward/export/model") for source in ppo["reward"]["sources"])


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_a_recipe_is_valid_and_the_files_it_names_exist(path: Path) -> None:
    assert path.name in KINDS, f"say in KINDS which configuration {path.name} is"
    config = load_config(KINDS[path.name], path)
    for text in strings(config.model_dump(mode="json")):
        if "/" in text:
            file = text.rpartition(":")[0] or text
            assert file.startswith(MADE_ELSEWHERE) or (ROOT / file).exists(), text


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("ppo.yaml")), ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_a_function_reward_of_a_recipe_can_be_imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(KINDS[path.name], path)
    assert isinstance(config, PPOConfig)
    for source in config.reward.sources:
        if isinstance(source, FunctionReward):
            if "sentiment" in source.path:
                pytest.importorskip("vaderSentiment", reason="the recipe's reward needs the package vaderSentiment (extra dev)")
            assert callable(load_function(source.path))


def test_the_sentiment_recipe_is_what_its_page_promises() -> None:
    config = load_config(PPOConfig, SENTIMENT / "ppo.yaml")
    assert (config.policy.ranks, config.reference.ranks, config.value.ranks, config.reward.ranks) == (2, 1, 1, 1)
    assert config.policy.deepspeed == "configs/deepspeed/zero2.json" and config.placement.launcher == "ray"
    assert config.needs_reference and config.needs_value
    rollout = config.rollout
    assert config.run.steps <= 15 and rollout.prompts_per_step * rollout.samples_per_prompt == 64 and rollout.max_new_tokens == 48
    assert rollout.temperature == 1 and not rollout.top_k and rollout.top_p == 1
    assert config.data.eval_fraction == 0.2 and config.evaluation.samples_per_prompt == 16
    vader, cheerful = config.reward.sources
    assert isinstance(vader, FunctionReward) and isinstance(cheerful, ModelReward) and (vader.weight, cheerful.weight) == (1.0, 0.1)


def test_the_commands_of_its_page_are_valid() -> None:
    page = (SENTIMENT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [
        shlex.split(line, comments=True)
        for line in page.splitlines()
        if "configs/recipes/sentiment/" in line and line.startswith(("rlhf-dist", "bash", "RANKS", "python"))
    ]
    assert len(commands) >= 5
    for words in commands:
        files = [word for word in words if word.startswith(("configs/", "launch/"))]
        assert files and all((ROOT / file).is_file() for file in files), words
        if any(word.endswith(".yaml") for word in words):
            at = next(index for index, word in enumerate(words) if word.endswith(".yaml"))
            load_config(KINDS[Path(words[at]).name], ROOT / words[at], words[at + 1 :])


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """The recipe's script, as a module."""
    pytest.importorskip("vaderSentiment", reason="the classifier's labels need the package vaderSentiment (extra dev)")
    return sys.modules[load_function(f"{SENTIMENT / 'build_classifier.py'}:build").__module__]


@pytest.fixture(scope="module")
def classifier(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A classifier built in a second or two, and its held-out accuracy."""
    folder = tmp_path_factory.mktemp("sentiment") / "classifier"
    return folder, builder.build(folder, builder.Size(stories=1200, held_out=300, epochs=3), seed=0)


def test_stories_are_the_same_for_a_seed_distinct_and_balanced(builder: ModuleType) -> None:
    openings = ["Once upon a time", "There was a cat"]
    texts, labels = builder.labelled(60, 1, openings)
    assert (texts, labels) == builder.labelled(60, 1, openings) and texts != builder.labelled(60, 2, openings)[0]
    assert len(set(texts)) == 60 and sum(labels) == 30 and not any("{" in text for text in texts)


def test_a_built_classifier_loads_as_a_reward_and_has_learnt(builder: ModuleType, classifier: tuple[Path, float], tiny_model: Path) -> None:
    folder, accuracy = classifier
    assert accuracy > 0.65  # the recipe's own size reaches more; a coin reaches 0.5
    module, tokenizer = load_classifier(EngineSection(), str(folder), label=1, transform="probability"), load_tokenizer(str(folder))
    happy = "Lily was happy. Tom and Mia were best friends. The girl loved to play with the ball. Ben laughed."
    sad = 'Lily was sad. Tom hated the box. The girl cried. Ben was angry and hurt. "I hate this!" said Tom.'
    texts = EncodedTexts.from_rows([tokenizer(text)["input_ids"] for text in (happy, sad)])
    high, low = module(**module.inputs(texts))["score_B"].tolist()
    assert 0 <= low < high <= 1 and high - low > 0.3
    assert not same_tokenizer(tokenizer, load_tokenizer(str(tiny_model)))
    assert tokenizer.unk_token_id not in tokenizer("Zyx said: a quixotic gnu!")["input_ids"][:4]  # unknown words are spelt


@pytest.mark.slow
def test_two_steps_of_the_sentiment_recipe(classifier: tuple[Path, float], shared: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_dist.cli.main", "ppo", "--config", str(SENTIMENT / "ppo.yaml")]
    overrides = {
        "placement.launcher": "spmd", "policy.model": shared / "models" / "stories260K", "reward.sources.1.model": classifier[0],
        "run.output_dir": tmp_path, "run.steps": 2, "evaluation.samples_per_prompt": 1, "evaluation.every": 0,
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command + [f"{key}={value}" for key, value in overrides.items()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    before = summary["held_out"]["before"]
    assert before["prompts"] == 55 and set(before["rewards"]) == {"vader", "cheerful"} and summary["dropped"] == {}
    assert 0.4 < before["rewards"]["vader"]["mean"] < 0.65 and 0 < before["rewards"]["cheerful"]["mean"] < 1
    assert abs(before["kl"]["mean"]) < 1e-5 < summary["kl"]
    score = before["rewards"]["vader"]["mean"] + 0.1 * before["rewards"]["cheerful"]["mean"]
    assert before["score"]["mean"] == pytest.approx(score, abs=1e-6)
    steps = [row for row in read_metrics(tmp_path / "ppo" / "metrics.jsonl") if "objective/kl" in row]
    assert [row["policy/version"] for row in steps] == [1, 2] and steps[1]["objective/kl"] > 0.1
