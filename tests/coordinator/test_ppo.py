"""Whole runs of the tiny model in this process, through the command line's own `main`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.cli.main import main
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config, load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.weights import SyncInfo
from rlhf_dist.coordinator.ppo import FILTERED, PPOCoordinator
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.runs.checkpoints import CheckpointStore
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.progress import BufferedReporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.rollout_log import read_rollouts
from rlhf_dist.runs.state import RunState
from rlhf_dist.runs.summary import config_hash

Values = dict[str, Any]
TIMED = ("perf/", "time", "coordinator/", "weight_sync/seconds")
ECOSYSTEM = {
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores", "objective/kl_coef",
    "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "policy/grad_norm", "loss/policy_avg", "loss/value_avg",
    "val/clipfrac_avg", "val/ratio", "val/response_length", "val/rollout_logprob_gap", "rewards/even", "lr/policy", "lr/value", "episode",
    "rollout/staleness", "val/behaviour_kl", "perf/generate_worked_seconds",
    "perf/tokens_per_second", "perf/generate_tokens_per_second", "perf/train_seconds", "coordinator/bytes_per_sample",
}  # fmt: skip


@pytest.fixture(scope="module")
def values_in(tiny_run: Callable[[Path], Values], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Values]:
    """`values_in(section={...}, ...)`: the tiny run in a folder of its own, with some keys changed."""

    def values(**changes: Values) -> Values:
        base = tiny_run(tmp_path_factory.mktemp("runs"))
        for section, given in changes.items():
            base[section] = base.get(section, {}) | given
        return base

    return values


@pytest.fixture(scope="module")
def run(rlhf_dist_ppo: Callable[..., Path], values_in: Callable[..., Values]) -> Callable[..., Path]:
    return lambda **changes: rlhf_dist_ppo(values_in(**changes))


@pytest.fixture(scope="module")
def base(run: Callable[..., Path]) -> Path:
    """Three steps with evaluations, and a checkpoint a step."""
    return run(run={"steps": 3}, evaluation={"every": 2, "samples_per_prompt": 2}, checkpoint={"every": 1, "keep": 2})


def numbers(root: Path) -> list[Values]:
    """Metrics that must not depend on the clock."""
    return [{name: x for name, x in line.items() if not name.startswith(TIMED)} for line in read_metrics(root / "metrics.jsonl")]


def samples(root: Path, step: int, folder: str = "rollouts") -> list[Values]:
    rows: list[Values] = read_rollouts(root / folder / f"step_{step:06d}.parquet").to_pylist()
    return rows


def texts(root: Path, steps: int) -> list[list[tuple[int, int, str]]]:
    return [[(row["prompt_id"], row["sample_index"], row["completion"]) for row in samples(root, step)] for step in range(1, steps + 1)]


def weights(folder: Path, kind: Any = AutoModelForCausalLM) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = kind.from_pretrained(folder).state_dict()
    return state


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    assert before.keys() == after.keys()
    return any(not torch.equal(before[name], after[name]) for name in before)


def summary_of(root: Path) -> Values:
    read: Values = json.loads((root / "summary.json").read_text())
    return read


# --- what a run leaves behind


def test_the_saved_config_is_the_resolved_one(base: Path) -> None:
    config = load_config(PPOConfig, base / "config.yaml")
    assert (base / "config.yaml").read_text() == dump_config(config)
    assert config.run.steps == 3 and config.algorithm.lam == 0.95 and config.policy.ranks == 1
    assert summary_of(base)["config_sha256"] == config_hash(dump_config(config))


def test_metrics_have_a_line_a_step_under_known_names(base: Path) -> None:
    lines = read_metrics(base / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {name.split("/")[0] for name in lines[0]} == {"step", "time", "preflight", "eval", "weight_sync"}
    for line in lines[1:]:
        assert line.keys() >= ECOSYSTEM
    assert [line["episode"] for line in lines[1:]] == [16, 32, 48]
    assert [line["policy/version"] for line in lines[1:]] == [1, 2, 3]
    assert ["eval/score" in line for line in lines] == [True, False, True, True]
    assert [line["lr/policy"] for line in lines[1:]] == pytest.approx([1e-3 * left / 12 for left in (9, 5, 1)])  # 4 optimizer steps each


def test_the_first_step_is_on_policy(base: Path) -> None:
    first = read_metrics(base / "metrics.jsonl")[1]
    assert abs(first["objective/kl"]) <= 1e-4
    assert first["val/rollout_logprob_gap_max"] <= 1e-4


def test_the_samplers_log_probs_may_be_the_old_ones(ppo_values: dict[str, Any], rlhf_dist_ppo: Callable[..., Path]) -> None:
    """One forward less, the same run up to rounding, and the gap is seen in the first ratio instead of being reported as 0."""
    lines = {
        how: read_metrics(
            rlhf_dist_ppo(ppo_values | {"run": ppo_values["run"] | {"name": how}}, f"algorithm.old_logprobs={how}") / "metrics.jsonl"
        )
        for how in ("recompute", "sampler")
    }
    for one, other in zip(lines["recompute"][1:], lines["sampler"][1:], strict=True):
        assert one["objective/kl"] == pytest.approx(other["objective/kl"], abs=1e-4)
        assert one["loss/policy_avg"] == pytest.approx(other["loss/policy_avg"], abs=1e-4)
        assert "val/rollout_logprob_gap" in one and "val/rollout_logprob_gap" not in other


def test_tensorboard_has_the_same_numbers(base: Path) -> None:
    events = EventAccumulator(str(base / "tensorboard")).Reload()
    for line in read_metrics(base / "metrics.jsonl")[1:]:
        shown = {event.step: event.value for event in events.Scalars("objective/scores")}
        assert shown[line["step"]] == pytest.approx(line["objective/scores"], rel=1e-6)
    assert set(events.Tags()["scalars"]) >= ECOSYSTEM


def test_every_sample_of_every_step_is_kept(base: Path) -> None:
    held_out = {row["prompt"] for row in samples(base, 0, "evaluation")}
    for line in read_metrics(base / "metrics.jsonl")[1:]:
        rows = samples(base, line["step"])
        assert len(rows) == 16 and all(row["kept"] for row in rows)
        assert {row["policy_version"] for row in rows} == {line["step"] - 1}
        assert [row["sample_index"] for row in rows] == [0, 1] * 8
        assert not held_out & {row["prompt"] for row in rows}
        assert all(row["prompt_tokens"] == 1 + len(row["prompt"].split()) for row in rows)
        assert sum(row["score"] for row in rows) / 16 == pytest.approx(line["objective/scores"])
        assert sum(row["kl"] for row in rows) / 16 == pytest.approx(line["objective/kl"], abs=1e-6)
        assert sum(row["response_tokens"] for row in rows) / 16 == line["val/response_length"]
    words = [word for row in rows for word in row["completion"].split()]
    assert words and set(words) <= {f"w{n}" for n in range(60)}


def test_the_raw_reward_is_what_the_users_function_says(base: Path) -> None:
    for row in samples(base, 2):
        words = row["completion"].split()
        assert row["reward/even"] == row["score"] == pytest.approx(sum(int(w[1:]) % 2 == 0 for w in words) / (1 + len(words)))


def test_prompts_follow_each_other_from_step_to_step(base: Path) -> None:
    seen = [row["prompt_id"] for step in (1, 2, 3) for row in samples(base, step)[::2]]
    assert len(set(seen)) == len(seen) == 24


def test_evaluations_are_paired(base: Path) -> None:
    assert sorted(path.name for path in (base / "evaluation").iterdir()) == [f"step_{step:06d}.parquet" for step in (0, 2, 3)]
    keys = [[(row["prompt_id"], row["sample_index"], row["prompt"]) for row in samples(base, step, "evaluation")] for step in (0, 2, 3)]
    assert keys[0] == keys[1] == keys[2] and len(keys[0]) == 2 * len({key[0] for key in keys[0]})
    assert [row["completion"] for row in samples(base, 0, "evaluation")] != [row["completion"] for row in samples(base, 3, "evaluation")]
    assert {row["policy_version"] for row in samples(base, 3, "evaluation")} == {3}
    assert all(abs(row["kl"]) <= 1e-4 for row in samples(base, 0, "evaluation"))


def test_checkpoints_hold_the_state_and_become_loadable_models(base: Path, tmp_path: Path) -> None:
    """After the last step nothing is left to go on with: the export is there."""
    kept = CheckpointStore(base / "checkpoints").all()
    assert [checkpoint.step for checkpoint in kept] == [1, 2]
    state = RunState.from_dict(kept[-1].state)
    assert (state.step, state.policy_version, state.prompt_cursor, state.optimizer_steps) == (2, 2, 16, 8)
    assert state.best_step in (0, 2) and state.weights and state.kl is not None
    for checkpoint in kept:
        checkpoint.verify()
        assert (checkpoint.folder / "config.yaml").read_text() == (base / "config.yaml").read_text()
        main(["export", str(checkpoint.folder / "policy"), "--out", str(tmp_path / str(checkpoint.step))])
    assert moved(weights(tmp_path / "1"), weights(tmp_path / "2"))
    assert moved(weights(tmp_path / "2"), weights(base / "export" / "policy"))


def test_the_export_loads_with_no_help_and_has_learnt(base: Path, tiny_model: Path) -> None:
    policy, value = base / "export" / "policy", base / "export" / "value"
    assert moved(weights(tiny_model), weights(policy))
    assert weights(value, AutoModelForSequenceClassification)["score.weight"].abs().sum() > 0
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    inputs = tokenizer("w1 w2", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 3


def test_the_summary_says_what_came_out(base: Path) -> None:
    summary, lines = summary_of(base), read_metrics(base / "metrics.jsonl")
    assert (summary["name"], summary["seed"], summary["steps"], summary["optimizer_steps"]) == ("test", 3, 3, 12)
    assert summary["kl"] == pytest.approx(lines[-1]["objective/kl"])
    held_out = summary["held_out"]
    assert held_out["before"]["score"]["mean"] == lines[0]["eval/score"] and held_out["after"]["score"]["mean"] == lines[-1]["eval/score"]
    assert held_out["after"]["rewards"]["even"]["mean"] == lines[-1]["eval/rewards/even"]
    assert held_out["difference"]["score"]["mean"] == pytest.approx(lines[-1]["eval/score"] - lines[0]["eval/score"])
    assert held_out["best_score"] == max(line["eval/score"] for line in lines if "eval/score" in line)
    assert set(summary["seconds"]) == {"generate", "score", "estimate", "train", "sync", "record", "evaluate"}
    assert 0 < sum(summary["seconds"].values()) <= summary["wall_seconds"]
    tokens = sum(row["response_tokens"] for step in (1, 2, 3) for row in samples(base, step))
    assert summary["tokens_per_second"]["train"] == pytest.approx(tokens / summary["seconds"]["train"])
    held_out_tokens = sum(row["response_tokens"] for step in (0, 2, 3) for row in samples(base, step, "evaluation"))
    assert summary["tokens_per_second"]["evaluate"] == pytest.approx(held_out_tokens / summary["seconds"]["evaluate"])
    assert summary["dropped"] == {} and summary["versions"]["torch"] == torch.__version__


# --- the same run, cut up otherwise


def test_a_run_can_be_repeated(base: Path, run: Callable[..., Path]) -> None:
    again = run(run={"steps": 3}, evaluation={"every": 2, "samples_per_prompt": 2}, checkpoint={"every": 1, "keep": 2})
    assert numbers(again) == numbers(base)
    assert texts(again, 3) == texts(base, 3)


def test_another_seed_is_another_run(base: Path, run: Callable[..., Path]) -> None:
    assert texts(run(run={"steps": 1, "seed": 4}), 1) != texts(base, 1)


def test_how_it_is_cut_changes_nothing(base: Path, run: Callable[..., Path]) -> None:
    """Laws 2 and 9: shards, decoding slots and microbatches are matters of speed."""
    cut = run(
        run={"steps": 3},
        evaluation={"every": 2, "samples_per_prompt": 2},
        rollout={"shards_per_rank": 3, "slots": 3},
        policy={"microbatch_tokens": 40},
        value={"microbatch_tokens": 25},
        reference={"microbatch_tokens": 33},
    )
    assert texts(cut, 3) == texts(base, 3)
    speed = ("rollout/rows_per_step", "preflight/", "weight_sync/checksum")  # the last is of every bit
    for ours, theirs in zip(numbers(cut), numbers(base), strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if not name.startswith(speed):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=2e-5), (theirs["step"], name)


# --- estimators and engines


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "rloo", "grpo"])
def test_estimators_start_what_they_need(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tiny_model: Path, estimator: str
) -> None:
    from rlhf_dist.cli import programs

    started: list[str] = []
    build = programs.build_worker
    monkeypatch.setattr(programs, "build_worker", lambda role, *given: started.append(role) or build(role, *given))
    root = run(algorithm={"estimator": estimator})
    assert started == (["policy", "reference", "value", "reward"] if estimator == "gae" else ["policy", "reference", "reward"])
    assert sorted(path.name for path in (root / "export").iterdir()) == (["policy", "value"] if estimator == "gae" else ["policy"])
    assert ("loss/value_avg" in numbers(root)[1]) == (estimator == "gae")
    assert moved(weights(tiny_model), weights(root / "export" / "policy"))
    assert numbers(root)[2]["objective/kl"] != 0


def test_with_lora_the_policy_is_its_own_reference(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    from rlhf_dist.cli import programs

    started: list[str] = []
    build = programs.build_worker
    monkeypatch.setattr(programs, "build_worker", lambda role, *given: started.append(role) or build(role, *given))
    root = run(policy={"lora": {"r": 4}, "optim": {"lr": 1e-2}})
    assert started == ["policy", "value", "reward"]
    lines = numbers(root)
    assert lines[0]["preflight/reference/max"] == 0.0
    assert abs(lines[1]["objective/kl"]) <= 1e-4 < abs(lines[2]["objective/kl"])
    plain, tuned = weights(tiny_model), weights(root / "export" / "policy")  # merged: the same names as before
    assert plain.keys() == tuned.keys()
    assert {name.split(".")[-2] for name in plain if not torch.equal(plain[name], tuned[name])} >= {"q_proj", "down_proj"}
    assert torch.equal(plain["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])


def test_rewards_add_up_by_weight(run: Callable[..., Path], values_in: Callable[..., Values], tiny_model: Path, tmp_path: Path) -> None:
    """A classifier on an engine of its own beside the function."""
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "classifier")
    function = values_in()["reward"]["sources"][0]
    model = {"name": "taste", "kind": "model", "model": str(tmp_path / "classifier"), "weight": 0.1}
    root = run(run={"steps": 1}, reward={"sources": [function | {"weight": 2.0}, model]})
    for row in samples(root, 1):
        assert row["score"] == pytest.approx(2 * row["reward/even"] + 0.1 * row["reward/taste"], abs=1e-6)
    assert len({row["reward/taste"] for row in samples(root, 1)}) > 8
    line = numbers(root)[1]
    assert line["rewards/taste_truncated"] == 0.0
    assert set(summary_of(root)["held_out"]["after"]["rewards"]) == {"even", "taste"}


def test_normalised_rewards_leave_the_raw_ones_and_the_held_out_yardstick(
    run: Callable[..., Path], values_in: Callable[..., Values]
) -> None:
    source = values_in()["reward"]["sources"][0]
    root = run(reward={"sources": [source | {"normalise": "standardise"}]}, evaluation={"samples_per_prompt": 3}, checkpoint={"every": 1})
    raw = [row["reward/even"] for row in samples(root, 1)]
    mean, deviation = sum(raw) / 16, statistics.stdev(raw)
    assert [row["score"] for row in samples(root, 1)] == pytest.approx([(x - mean) / deviation for x in raw])
    assert CheckpointStore(root / "checkpoints").all()[-1].state["reward_mixer"]["even"]["count"] == 16  # training samples alone
    before = [row["reward/even"] for row in samples(root, 0, "evaluation")]
    after = samples(root, 2, "evaluation")
    mean, deviation = sum(before) / len(before), statistics.stdev(before)
    assert [row["score"] for row in after] == pytest.approx([(row["reward/even"] - mean) / deviation for row in after])


def test_whitened_rewards_do_not_depend_on_shards(run: Callable[..., Path]) -> None:
    one, three = (run(algorithm={"whiten_rewards": True}, rollout={"shards_per_rank": shards}) for shards in (1, 3))
    assert texts(one, 2) == texts(three, 2)
    assert numbers(one)[2]["loss/value_avg"] == pytest.approx(numbers(three)[2]["loss/value_avg"], rel=1e-5)


def test_a_reward_gets_the_same_columns_however_prompts_are_cut(run: Callable[..., Path], tmp_path: Path) -> None:
    """One prompt in five has a hero; a shard without any must not fall back to the parameter's default."""
    (tmp_path / "heroes.py").write_text(HEROES)
    rows = [{"prompt": f"w{n}"} | ({"hero": f"w{n}"} if n % 5 == 4 else {}) for n in range(16)]
    (tmp_path / "heroes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = {"sources": [{"name": "hero", "kind": "function", "path": f"{tmp_path / 'heroes.py'}:reward"}]}
    data = {"train": str(tmp_path / "heroes.jsonl"), "eval_fraction": 0.0}
    one, eight = (run(data=data, reward=reward, run={"steps": 1}, rollout={"shards_per_rank": shards}) for shards in (1, 8))
    scores = [[row["reward/hero"] for row in samples(root, 1)] for root in (one, eight)]
    assert scores[0] == scores[1] and {0.0, 1.0} == set(scores[0]), "each row was told whether it has a hero"


HEROES = """
def reward(prompts, completions, hero=None):
    return [0.5] * len(prompts) if hero is None else [float(name is not None) for name in hero]
"""


def test_the_first_baseline_is_the_mean_return_also_with_a_reference_of_its_own(
    run: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    """KL is not 0 at step 0 then: its penalty is part of the return, and of the mean that is taken off."""
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    root = run(
        run={"steps": 1},
        reference={"model": str(tmp_path / "other")},
        algorithm={"estimator": "reinforce", "epochs": 1, "minibatches": 1, "kl": {"coef": 0.3}},
        rollout={"shards_per_rank": 2},
    )
    rows, line = samples(root, 1), numbers(root)[1]
    returns = [row["score"] - 0.3 * row["kl"] for row in rows]
    baseline = sum(returns) / len(rows)
    assert line["objective/rlhf_reward"] == pytest.approx(baseline, abs=1e-6) and abs(line["objective/non_score_reward"]) > 0.2
    lengths = [row["response_tokens"] for row in rows]
    by_token = sum(n * (r - baseline) for n, r in zip(lengths, returns, strict=True)) / sum(lengths)
    assert line["loss/policy_avg"] == pytest.approx(-by_token, abs=1e-5), "on policy: minus the mean advantage of the tokens"


# --- control of the update


def test_the_reward_goes_up(run: Callable[..., Path]) -> None:
    root = run(
        run={"steps": 12},
        policy={"optim": {"lr": 1e-2}},
        value={"optim": {"lr": 1e-2}},
        rollout={"prompts_per_step": 32, "slots": 32},
        algorithm={"epochs": 1, "minibatches": 1, "kl": {"coef": 0.01}},
        evaluation={"samples_per_prompt": 4},
    )
    held_out = summary_of(root)["held_out"]
    assert held_out["difference"]["score"]["low"] > 0.1  # about 0.26; the whole interval is clear of no change
    scores = [line["objective/scores"] for line in numbers(root)[1:]]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15
    assert held_out["after"]["kl"]["mean"] > 1.0


def test_adaptive_kl_follows_the_mean_over_all_sequences(run: Callable[..., Path]) -> None:
    target, horizon, beta = 0.02, 100, 0.3
    kl = {"coef": beta, "adaptive": True, "target": target, "horizon": horizon}
    root = run(run={"steps": 4}, algorithm={"kl": kl}, rollout={"shards_per_rank": 2})
    lines = numbers(root)[1:]
    for line in lines:
        assert line["objective/kl_coef"] == pytest.approx(beta, rel=1e-12)  # the β that this step used
        mean = sum(row["kl"] for row in samples(root, line["step"])) / 16
        beta *= 1 + min(0.2, max(-0.2, mean / target - 1)) * 16 / horizon
        assert line["objective/non_score_reward"] == pytest.approx(-line["objective/kl_coef"] * mean, abs=1e-5)
    assert len({line["objective/kl_coef"] for line in lines}) == 4


def test_without_adaptation_the_coefficient_stays(base: Path) -> None:
    assert {line["objective/kl_coef"] for line in numbers(base)[1:]} == {0.05}


def test_a_far_step_ends_the_update(run: Callable[..., Path]) -> None:
    """The first minibatch is on policy (k2 = 0), the second is past any target."""
    root = run(algorithm={"target_kl_step": 1e-9})
    assert [line["policy/stopped_early"] for line in numbers(root)[1:]] == [1.0, 1.0]
    assert summary_of(root)["optimizer_steps"] == 4  # two of four in each step


def test_the_value_model_warms_up_alone(run: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    root = run(value={"warmup_steps": 1, "optim": {"lr": 1e-2}}, checkpoint={"every": 1})
    first, second = numbers(root)[1:]
    assert "lr/policy" not in first and "lr/policy" in second
    assert (first["policy/version"], second["policy/version"]) == (1, 2), "a version is a step, whether the policy moved in it or not"
    after_one = root / "checkpoints" / "step_000001"
    for role in ("policy", "value"):
        main(["export", str(after_one / role), "--out", str(tmp_path / role)])
    assert not moved(weights(tiny_model), weights(tmp_path / "policy"))
    assert weights(tmp_path / "value", AutoModelForSequenceClassification)["score.weight"].abs().sum() > 0
    assert moved(weights(tiny_model), weights(root / "export" / "policy"))
    assert {row["policy_version"] for row in samples(root, 2)} == {1}


def value_loss(rows: list[Values], *, bootstrap: bool) -> float:
    """½ mean R² over tokens with V = 0 and no KL: R[t] = λ^(T−1−t)·score, and nothing where a cut completion is bootstrapped from V = 0."""
    paid = [row for row in rows if not (bootstrap and row["stop_reason"] == "length")]
    total = sum((0.95 ** (row["response_tokens"] - 1 - t) * row["score"]) ** 2 for row in paid for t in range(row["response_tokens"]))
    return 0.5 * total / sum(row["response_tokens"] for row in rows)


@pytest.mark.parametrize("truncated", ["terminal", "bootstrap"])
def test_a_cut_completion_is_paid_or_bootstrapped(run: Callable[..., Path], truncated: str) -> None:
    root = run(run={"steps": 1}, algorithm={"truncated": truncated, "epochs": 1, "minibatches": 1, "value_clip": None})
    rows = samples(root, 1)
    assert {row["stop_reason"] for row in rows} == {"length", "stop_token"}
    assert numbers(root)[1]["loss/value_avg"] == pytest.approx(value_loss(rows, bootstrap=truncated == "bootstrap"), rel=1e-4)
    assert value_loss(rows, bootstrap=True) < 0.9 * value_loss(rows, bootstrap=False)


# --- what ends a completion, and what it pays


def test_stop_strings_end_completions(run: Callable[..., Path]) -> None:
    root = run(rollout={"stop_strings": ["w7 ", "w8"]})
    rows = [row for step in (1, 2) for row in samples(root, step)]
    stopped = [row for row in rows if row["stop_reason"] == "stop_string"]
    assert stopped and not any("w8" in row["completion"] or "w7 " in row["completion"] for row in rows)
    assert numbers(root)[1]["val/stop_string_rate"] == sum(row["stop_reason"] == "stop_string" for row in samples(root, 1)) / 16


def test_a_special_token_may_be_a_stop_string(run: Callable[..., Path]) -> None:
    """As `<|im_end|>` of chat models: it is left out of the text that rewards see, so it cannot be found and cut there."""
    root = run(rollout={"stop_strings": ["<unk>"], "max_new_tokens": 60}, run={"steps": 1})
    stopped = [row for row in samples(root, 1) if row["stop_reason"] == "stop_string"]
    assert stopped and all(0 < len(row["completion"].split()) < row["response_tokens"] or row["response_tokens"] == 1 for row in stopped)


def test_length_control_reaches_the_score(run: Callable[..., Path], values_in: Callable[..., Values]) -> None:
    reward = values_in()["reward"] | {
        "missing_stop": {"rule": "subtract", "value": 3.0},
        "soft_overlong": {"buffer": 4, "penalty": 0.5},
        "minimum_length": {"tokens": 3, "penalty": 7.0},
    }
    root = run(reward=reward)
    rows = [row for step in (1, 2) for row in samples(root, step)]
    for row in rows:
        length = row["response_tokens"]
        expected = row["reward/even"] - 3.0 * (row["stop_reason"] == "length") - 0.5 * max(0, length - 8) / 4 - 7.0 * (length < 3)
        assert row["score"] == pytest.approx(expected)
    assert {row["stop_reason"] for row in rows} == {"length", "stop_token"}
    assert any(row["response_tokens"] < 3 for row in rows) and any(8 < row["response_tokens"] < 12 for row in rows)
    line = numbers(root)[1]
    assert line["objective/scores"] == pytest.approx(line["rewards/even"] + line["rewards/length_control"])


def test_a_missing_stop_may_replace_the_score(run: Callable[..., Path], values_in: Callable[..., Values]) -> None:
    root = run(run={"steps": 1}, reward=values_in()["reward"] | {"missing_stop": {"rule": "replace", "value": -1.0}})
    for row in samples(root, 1):
        assert row["score"] == (-1.0 if row["stop_reason"] == "length" else row["reward/even"])


def test_filtered_sampling_is_said_once_and_its_mass_logged(
    run: Callable[..., Path], base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = run(rollout={"top_p": 0.5, "top_k": 20})
    assert capfd.readouterr().out.count(FILTERED) == 1
    for line in numbers(root)[1:]:
        assert 0.4 < line["rollout/kept_mass"] < 1.0
    assert "rollout/kept_mass" not in numbers(base)[1]


# --- rewards that abstain


ABSTAINS = """
def reward(prompts, completions, answer):
    return [None if a in ("w0", "w1", "w2", "w9") else float(len(c.split())) for a, c in zip(answer, completions)]
def never(prompts, completions):
    return [None for _ in completions]
"""


def test_dropped_groups_are_counted_and_shown(run: Callable[..., Path], tmp_path: Path) -> None:
    """The reward looks at a column; the first prompts make up whole shards of which nothing is left."""
    (tmp_path / "abstains.py").write_text(ABSTAINS)
    reward = {"sources": [{"name": "words", "kind": "function", "path": f"{tmp_path / 'abstains.py'}:reward"}]}
    root = run(reward=reward, rollout={"shards_per_rank": 8}, data={"eval_fraction": 0.0})
    rows = samples(root, 1)
    dropped = [row for row in rows if not row["kept"]]
    assert len(rows) == 16 and len(dropped) == 6
    assert all(row["score"] is None and row["reward/words"] is None for row in dropped)
    assert all(row["completion"] is not None and row["kl"] is not None for row in dropped)
    lines = numbers(root)[1:]
    assert [line["rewards/dropped_samples"] for line in lines] == [6, 2]
    assert lines[0]["rewards/words_abstained"] == 6 / 16
    kept = [row["score"] for row in rows if row["kept"]]
    assert lines[0]["objective/scores"] == pytest.approx(sum(kept) / 10)
    assert summary_of(root)["dropped"] == {"every reward abstained": 8}
    assert summary_of(root)["held_out"] is None and list((root / "evaluation").iterdir()) == []


def test_prompts_that_were_left_out_are_counted(run: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Prompts have two to seven tokens, in turns."""
    root = run(data={"max_prompt_tokens": 4, "overlong": "drop"}, rollout={"shards_per_rank": 2})
    lines = numbers(root)[1:]
    counted = [line["data/dropped_prompts"] for line in lines]
    assert min(counted) > 0 and summary_of(root)["dropped"] == {"prompt longer than data.max_prompt_tokens": sum(counted)}
    assert lines[1]["data/truncated_prompts"] == 0
    assert max(row["prompt_tokens"] for step in (1, 2) for row in samples(root, step)) == 4
    assert "held_out_dropped" in capfd.readouterr().out
    cut = run(run={"steps": 1}, data={"max_prompt_tokens": 4, "overlong": "truncate_left"})
    assert numbers(cut)[1]["data/truncated_prompts"] > 0 and "data/dropped_prompts" in numbers(cut)[1]


@pytest.mark.parametrize("overlong", ["drop", "truncate_left"])
def test_what_was_left_out_does_not_depend_on_shards(run: Callable[..., Path], overlong: str) -> None:
    data = {"max_prompt_tokens": 4, "overlong": overlong, "shuffle_buffer": 5}
    roots = [run(data=data, rollout={"shards_per_rank": shards}) for shards in (1, 2)]
    names = ("data/dropped_prompts", "data/truncated_prompts")
    one, two = ([[line[name] for name in names] for line in numbers(root)[1:]] for root in roots)
    assert one == two and sum(map(sum, one)) > 0
    assert summary_of(roots[0])["dropped"] == summary_of(roots[1])["dropped"]


# --- what stops a run


def test_whitening_a_single_token_stops_the_run(run: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    small = {"rollout": {"prompts_per_step": 1, "samples_per_prompt": 1, "max_new_tokens": 1}}
    once = {"epochs": 1, "minibatches": 1}
    with pytest.raises(SystemExit) as ended:
        run(algorithm=once, **small)
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert "whitening needs two tokens at least, the step has 1" in error and "algorithm.whiten_advantages=false" in error
    run(run={"steps": 1}, algorithm=once | {"whiten_advantages": False}, **small)


class Broken:
    """A policy whose ranks disagree after a sync."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def describe(self) -> Values:
        return {"held_out_prompts": 0}

    def quarantine_to(self, path: str) -> None:
        pass

    def sync_weights(self, version: int) -> SyncInfo:
        return SyncInfo(17 + self.rank)


def test_ranks_that_drift_apart_stop_the_run(local_group: Any, ppo_values: Values) -> None:
    groups = Groups(local_group("policy", [Broken(0), Broken(1)]), local_group("reward", [Broken(0)]))
    reporter = BufferedReporter()
    with pytest.raises(UserError, match=r"ranks hold different weights \(checksums \[17, 18\]\)"):
        PPOCoordinator(PPOConfig.model_validate(ppo_values), groups, Recorder(None), reporter).run()
    assert [event.method for event in reporter.drain(0)] == ["started"]


def test_a_ratio_off_one_stops_the_run(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A trainer whose gradient forward is not its scoring forward, as with dropout on in training only."""
    from rlhf_dist.algos import objectives

    monkeypatch.setattr(objectives, "log_ratio", lambda new, old, mask: torch.where(mask, new - old + 0.3, 0.0))
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert "step 1, first minibatch" in error and f"{math.exp(0.3) - 1:.3g}" in error and "dropout is on" in error
