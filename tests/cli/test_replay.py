"""Steps that are not finite, in whole runs through the command line: skipped, written down, replayed; too many end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_dist.cli.main import main
from rlhf_dist.runs.capsule import FORMAT, read_capsule
from rlhf_dist.runs.checkpoints import CheckpointStore
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.workers.replay import replay
from rlhf_dist.workers.training import Trainer

Values = dict[str, Any]
Plant = Callable[[str, Sequence[int]], None]
ROW = 3


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """`plant(role, steps)`: from now on, one number that the role's loss reads is NaN in these steps (from 1)."""

    def planted(role: str, steps: Sequence[int]) -> None:
        load, loaded = Trainer.load, [0]

        def spoilt(self: Trainer, shards: Any, advantages: Any) -> int:
            rows = load(self, shards, advantages)
            loaded[0] += self._name == role
            if self._name == role and loaded[0] in steps:
                assert self._experience is not None
                name = "advantages_BT" if role == "policy" else "returns_BT"
                values = getattr(self._experience, name).clone()
                values[ROW, 0] = math.nan
                self._experience = self._experience.replace(**{name: values})
            return rows

        monkeypatch.setattr(Trainer, "load", spoilt)

    return planted


def lines_of(root: Path) -> list[Values]:
    return read_metrics(root / "metrics.jsonl")


def capsules_of(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "capsules").glob("*"))


def settled(root: Path) -> list[Values]:
    """Metrics that do not depend on the clock."""
    timed = ("perf/", "time", "coordinator/", "weight_sync/seconds")
    return [{name: x for name, x in line.items() if not name.startswith(timed)} for line in lines_of(root)]


@pytest.mark.parametrize("role", ["policy", "value"])
def test_a_step_that_is_not_finite_is_skipped_written_down_and_replayed(
    role: str, plant: Plant, ppo_values: Values, rlhf_dist_ppo: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plant(role, [1])
    root = rlhf_dist_ppo(ppo_values | {role: ppo_values[role] | {"microbatch_tokens": 60}})
    said = capsys.readouterr().out
    first, second = lines_of(root)[1:]
    assert all(math.isfinite(value) for line in (first, second) for value in line.values())
    assert first[f"{role}/skipped_steps"] == 0.5 and second[f"{role}/skipped_steps"] == 0.0  # the row is in one minibatch of each epoch
    assert (first["sentinels/skipped_steps"], second["sentinels/skipped_steps"]) == (2.0, 0.0)
    assert f"of 4 of the {role} skipped: the loss was not finite" in said
    names = capsules_of(root)
    assert len(names) == 2 and all(name.startswith(f"step_000001_{role}_0") for name in names) and f"capsules/{names[0]}" in said
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(root / "capsules" / names[0])])
        raise SystemExit(0)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    planted = "advantages_BT" if role == "policy" else "returns_BT"
    assert f"{planted} is nan at response token 1" in shown and "reproduced" in shown and "not reproduced" not in shown
    capsule = read_capsule(root / "capsules" / names[0])
    found = replay(capsule)
    assert [bool(each.fault) for each in found.samples].count(True) == 1 and len(found.samples) == 8
    finite = [each for each in found.microbatches if math.isfinite(each.recorded)]
    assert len(finite) == len(found.microbatches) - 1 >= 1, "the other microbatches tell whether the weights are those of that moment"
    for each in finite:
        assert abs(each.now - each.recorded) <= 1e-6 * each.size


def test_an_infinite_gradient_of_a_finite_loss_is_replayed_to_the_very_loss(
    monkeypatch: pytest.MonkeyPatch, ppo_values: Values, rlhf_dist_ppo: Callable[..., Path]
) -> None:
    from rlhf_dist.engines.deepspeed import DeepSpeedEngine

    step, taken = DeepSpeedEngine.optimizer_step, [0]

    def spoilt(self: Any) -> Any:
        taken[0] += 1
        if taken[0] == 9:  # of policy and value together: in the second step, after weights have moved
            next(p for p in self.module.parameters() if p.grad is not None).grad[0, 0] = math.inf
        return step(self)

    monkeypatch.setattr(DeepSpeedEngine, "optimizer_step", spoilt)
    root = rlhf_dist_ppo(ppo_values | {"policy": ppo_values["policy"] | {"lora": {"r": 2}, "optim": {"lr": 1e-2}}})
    (name,) = capsules_of(root)
    assert name == "step_000002_policy_01"
    capsule = read_capsule(root / "capsules" / name)
    assert capsule.facts.fault == "gradient" and math.isinf(capsule.facts.grad_norm) and math.isfinite(capsule.loss)
    found = replay(capsule)
    assert found.reproduced and found.loss == pytest.approx(capsule.loss, rel=1e-6) and abs(found.loss) > 1e-9
    assert found.grad_norm is not None and math.isfinite(found.grad_norm), "here nobody makes it infinite"
    assert not (root / "capsules" / name / "model").exists(), "an adapter is small: its base is not copied"


def weights_of(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "export" / "policy" / "model.safetensors")


def test_after_too_many_in_a_row_the_run_stops_saved_and_goes_on_exactly(
    plant: Plant,
    ppo_values: Values,
    rlhf_dist_ppo: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three epochs of one minibatch: all of step 2 is skipped. A run that may skip more never stops; both end with the same bits."""

    def values(name: str, most: int) -> Values:
        run = ppo_values["run"] | {"name": name, "steps": 3}
        algorithm = {"epochs": 3, "minibatches": 1, "kl": {"adaptive": True, "target": 0.01}}
        return ppo_values | {"run": run, "algorithm": algorithm, "sentinels": {"max_skipped": most, "capsules": 1}}

    plant("policy", [2])
    through = rlhf_dist_ppo(values("through", 100))
    monkeypatch.undo()
    plant("policy", [2])
    with pytest.raises(SystemExit) as ended:
        rlhf_dist_ppo(values("stopped", 3))
    monkeypatch.undo()
    assert ended.value.code == 2
    root, said = Path(ppo_values["run"]["output_dir"]) / "stopped", capsys.readouterr().err
    assert "3 optimizer steps of the policy in a row were skipped, because the loss was not finite" in said and "step 2" in said
    assert capsules_of(root) == ["step_000002_policy_01"] and f"rlhf-dist replay {root / 'capsules' / 'step_000002_policy_01'}" in said
    assert [checkpoint.step for checkpoint in CheckpointStore(root / "checkpoints").all()] == [2]
    assert "loss/policy_avg" not in lines_of(root)[2] and lines_of(root)[2]["policy/skipped_steps"] == 1.0
    assert rlhf_dist_ppo(values("stopped", 3), "run.resume=auto") == root
    assert capsules_of(root) == ["step_000002_policy_01"]
    ours, theirs = weights_of(root), weights_of(through)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert settled(root) == settled(through)


def test_a_weight_that_is_not_finite_ends_the_run_at_once(
    monkeypatch: pytest.MonkeyPatch, ppo_values: Values, rlhf_dist_ppo: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_dist.engines.deepspeed import DeepSpeedEngine

    step, taken = DeepSpeedEngine.optimizer_step, [0]

    def spoilt(self: Any) -> Any:
        info = step(self)
        taken[0] += 1
        if taken[0] == 11:  # the policy's second of step 2
            with torch.no_grad():
                next(iter(self.module.parameters()))[0, 0] = math.nan
        return info

    monkeypatch.setattr(DeepSpeedEngine, "optimizer_step", spoilt)
    with pytest.raises(SystemExit):
        rlhf_dist_ppo(ppo_values, "checkpoint.every=1")
    root, said = Path(ppo_values["run"]["output_dir"]) / "test", capsys.readouterr().err
    assert "the weight model.model.embed_tokens.weight of the policy is not finite after an optimizer step" in said and "step 2" in said
    assert [checkpoint.step for checkpoint in CheckpointStore(root / "checkpoints").all()] == [1]
    assert f"{root / 'checkpoints' / 'step_000001'} is whole" in said and capsules_of(root) == []


def test_log_probs_that_are_not_finite_skip_the_step_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, ppo_values: Values, rlhf_dist_ppo: Callable[..., Path]
) -> None:
    """They reach every advantage, by whitening: no minibatch is trained on. KL controller and state go on from the step before."""
    from rlhf_dist.workers.policy import PolicyWorker

    score, scored = PolicyWorker.score, [0]

    def spoilt(self: PolicyWorker, shard: Any) -> Any:
        answer = score(self, shard)
        scored[0] += 1
        if scored[0] == 4:  # after preflight, the first evaluation and step 1
            answer.payload.tensors["old_logprobs_BT"][ROW, 0] = math.nan
        return answer

    monkeypatch.setattr(PolicyWorker, "score", spoilt)
    values = ppo_values | {"run": ppo_values["run"] | {"steps": 3}, "sentinels": {"max_skipped": 5}, "value": {"warmup_steps": 0}}
    root = rlhf_dist_ppo(values | {"algorithm": {"estimator": "rloo", "kl": {"adaptive": True}, "epochs": 1, "minibatches": 2}})
    lines = lines_of(root)
    assert lines[2]["policy/skipped_steps"] == 1.0 and lines[2]["sentinels/non_finite_metrics"] >= 1 and "objective/kl" not in lines[2]
    assert lines[3]["objective/kl_coef"] == lines[2]["objective/kl_coef"] and lines[3]["policy/skipped_steps"] == 0.0
    assert lines[1]["sentinels/non_finite_metrics"] == lines[3]["sentinels/non_finite_metrics"] == 0.0
    faults = [each.fault for each in replay(read_capsule(root / "capsules" / "step_000002_policy_01")).samples]
    assert any(fault.startswith("old_logprobs_BT is nan") for fault in faults) or all("advantages_BT" in fault for fault in faults)


@pytest.fixture
def rlhf_dist_dpo(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`rlhf_dist_dpo(name, "key=value", …)`: six steps of `rlhf-dist dpo` on twelve pairs; what the reference says of `ROW` is infinite."""
    from rlhf_dist.workers.dpo import DPOWorker

    keep = DPOWorker.keep_reference

    def spoilt(self: DPOWorker, train: Any, evaluation: Any) -> None:
        keep(self, [*train[:ROW], (-math.inf, train[ROW][1]), *train[ROW + 1 :]], evaluation)

    monkeypatch.setattr(DPOWorker, "keep_reference", spoilt)
    rows = [{"prompt": f"w{n} w3", "chosen": f" w{n + 20}" * (1 + n % 3), "rejected": " w9"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data": {"train": str(tmp_path / "pairs.jsonl"), "max_tokens": 32},
        "model": {"model": str(tiny_model), "optim": {"lr": 1e-3}, "microbatch_tokens": 24},
        "training": {"epochs": 2, "batch_size": 4},
        "placement": {"launcher": "spmd"},
    }
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(values))

    def run(name: str, *overrides: str) -> Path:
        main(["dpo", "--config", str(tmp_path / "dpo.yaml"), f"run.output_dir={tmp_path / 'runs'}", f"run.name={name}", *overrides])
        return tmp_path / "runs" / name

    return run


def test_a_supervised_step_that_is_not_finite_is_skipped_written_down_and_replayed(
    rlhf_dist_dpo: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One that stops after it and goes on ends as one that never stopped: same weights, metrics, capsules."""
    through = rlhf_dist_dpo("through", "training.capsules=1")
    said, lines = capsys.readouterr().out, lines_of(through)
    skipped = [line["step"] for line in lines if line["skipped_steps"]]
    assert len(skipped) == 2 and all("loss" not in line for line in lines if line["skipped_steps"]), "the pair comes once an epoch"
    name = f"step_{skipped[0]:06d}_model_01"
    assert capsules_of(through) == [name] and f"capsule: {through / 'capsules' / name}" in said
    assert f"step {skipped[0]} skipped: the loss was not finite" in said
    main(["replay", str(through / "capsules" / name)])
    shown = capsys.readouterr().out
    assert f"row {ROW}: reference log-prob of chosen is -inf" in shown and f"pairs.jsonl:{ROW + 1}'" in shown and "w23" in shown
    assert "step of the model (the loss was not finite)" in shown and shown.splitlines()[-1] == "reproduced"
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(through / "capsules" / name), "--device", "toaster"])
    assert ended.value.code == 2 and "the model cannot go to toaster" in capsys.readouterr().err
    capsule = read_capsule(through / "capsules" / name)
    finite = [each for each in replay(capsule).microbatches if math.isfinite(each.recorded)]
    assert finite and all(abs(each.now - each.recorded) <= 1e-6 * each.size for each in finite)
    with pytest.raises(SystemExit) as ended:
        rlhf_dist_dpo("stopped", "training.capsules=1", "training.max_skipped=1")
    stopped = through.parent / "stopped"
    assert ended.value.code == 2 and f"rlhf-dist replay {stopped / 'capsules' / name}" in capsys.readouterr().err
    rlhf_dist_dpo("stopped", "training.capsules=1", "training.max_skipped=9", "run.resume=auto")
    assert capsules_of(stopped) == [name] and settled(stopped) == settled(through)
    ours, theirs = (load_file(root / "export" / "model" / "model.safetensors") for root in (stopped, through))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert capsules_of(rlhf_dist_dpo("none", "training.capsules=0", "training.epochs=1")) == []


def test_a_capsule_that_is_not_whole_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, words in ((tmp_path / "none", "there is no capsule.json"), (tmp_path / "odd", "cannot be read: KeyError")):
        if folder.name == "odd":
            folder.mkdir()
            (folder / "capsule.json").write_text(json.dumps({"format": FORMAT}))
        with pytest.raises(SystemExit) as ended:
            main(["replay", str(folder)])
        assert ended.value.code == 2 and words in capsys.readouterr().err


def test_another_loss_than_was_recorded_is_said_and_ends_with_status_1(
    plant: Plant, ppo_values: Values, rlhf_dist_ppo: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plant("policy", [1])
    folder = rlhf_dist_ppo(ppo_values | {"policy": ppo_values["policy"] | {"microbatch_tokens": 60}}, "run.steps=1") / "capsules"
    folder = sorted(folder.iterdir())[0]
    values = json.loads((folder / "capsule.json").read_text())
    losses = values["parts"][0]["losses"]
    index = next(number for number, loss in enumerate(losses) if not isinstance(loss, str))
    losses[index] += 1e-3
    (folder / "capsule.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(folder), "--no-gradient"])
    assert ended.value.code == 1 and "not reproduced: the losses differ" in capsys.readouterr().out
    values["parts"][0]["microbatches"].append([8])
    losses.append(0.0)
    (folder / "capsule.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(folder), "--no-gradient"])
    assert ended.value.code == 2 and "rank 0 has 8 rows for microbatches of 9" in capsys.readouterr().err
