"""`rlhf-dist reward` end to end in one plain process: what it learns, what it leaves, what it refuses."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.cli.checks import check_run
from rlhf_dist.cli.main import main
from rlhf_dist.cli.reward import show_report
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.rewards.text import same_tokenizer
from rlhf_dist.runs.metrics import read_metrics

Run = Callable[..., Path]
GOOD = [
    {"prompt": f"w{n % 60} w{(7 * n) % 60}", "chosen": f" w{n % 30} w1", "rejected": f" w{30 + n % 30}" + " w40" * (n % 3)}
    for n in range(120)
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run("key=value", …, rows=…, name=…)`: a run on a file of these rows (or bytes); returns its folder."""

    def run(*overrides: str, rows: Any = GOOD, name: str = "rows.jsonl") -> Path:
        folder = tmp_path_factory.mktemp("reward")
        (folder / name).write_bytes(rows if isinstance(rows, bytes) else lines(rows))
        values = {
            "run": {"output_dir": str(folder)},
            "data": {"train": str(folder / name), "eval_fraction": 0.2, "max_tokens": 32},
            "model": {"model": str(tiny_model), "optim": {"lr": 1e-2}},
            "training": {"epochs": 2, "batch_size": 16},
            "placement": {"launcher": "spmd"},
        }
        (folder / "reward.yaml").write_text(yaml.safe_dump(values))
        main(["reward", "--config", str(folder / "reward.yaml"), *overrides])
        return folder / "reward"

    return run


@pytest.fixture(scope="module")
def finished(run: Run) -> Path:
    return run("reward_model.centring=0.01")


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def no_nan(folder: Path) -> bool:
    return all(
        math.isfinite(value) for line in read_metrics(folder / "metrics.jsonl") for value in line.values() if isinstance(value, float)
    )


def test_it_learns_and_says_so(finished: Path) -> None:
    steps = read_metrics(finished / "metrics.jsonl")
    before, after = steps[0], steps[-1]
    assert after["eval/loss"] < 0.5 * before["eval/loss"] and after["eval/accuracy"] > 0.9 and no_nan(finished)
    assert after["eval/rewards/margins"] == pytest.approx(after["eval/rewards/chosen"] - after["eval/rewards/rejected"])
    assert {"loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/mean", "lr"} <= after.keys()
    summary = summary_of(finished)
    assert summary["stage"] == "reward" and summary["rows"] == {"train": summary["rows"]["train"], "eval": 120 - summary["rows"]["train"]}


def test_the_report_agrees_with_the_metrics(finished: Path) -> None:
    report, last = summary_of(finished)["report"], read_metrics(finished / "metrics.jsonl")[-1]
    made = json.loads((finished / "report" / "report.json").read_text())
    assert made["held_out"]["pairs"] == report["pairs"] == summary_of(finished)["rows"]["eval"]
    assert report["accuracy"]["mean"] == pytest.approx(last["eval/accuracy"], abs=0.05), "prompts weigh the same there, rows here"
    assert {"longer answer wins", "shorter answer wins", "random"} == set(report["baselines"])
    assert (finished / report["page"]).stat().st_size > 10_000


def test_what_the_user_sees_at_the_end(finished: Path) -> None:
    report = summary_of(finished)["report"]
    console = Console(record=True, width=160)
    show_report(report, finished, console)
    text = console.export_text()
    assert f"{report['accuracy']['mean']:.3f} [" in text and "95" not in report["facts"][0]["name"]
    assert "Rows, held out" in text and str(finished / "report" / "report.html") in text


def test_models_load_with_transformers_and_score(finished: Path) -> None:
    for name in ("model", "best"):
        model = AutoModelForSequenceClassification.from_pretrained(finished / "export" / name)
        tokenizer = AutoTokenizer.from_pretrained(finished / "export" / name)
        scores = model(**tokenizer([row["prompt"] + row[k] + " </s>" for row in GOOD[:9] for k in ("chosen", "rejected")], padding=True,
                                   return_tensors="pt")).logits[:, 0]  # fmt: skip
        assert float((scores[0::2] > scores[1::2]).float().mean()) > 0.8 and tokenizer.padding_side == "right"


def test_it_is_deterministic_and_does_not_depend_on_the_cut(finished: Path, run: Run) -> None:
    losses = [line["loss"] for line in read_metrics(finished / "metrics.jsonl")[1:]]
    again = run("reward_model.centring=0.01", "model.microbatch_tokens=40")
    assert [line["loss"] for line in read_metrics(again / "metrics.jsonl")[1:]] == pytest.approx(losses, rel=1e-4)


def test_without_held_out_rows_it_says_that_there_is_no_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("data.eval_fraction=0", "training.max_steps=1")
    assert "no report: there are no held-out rows" in capsys.readouterr().out
    assert "none" in summary_of(folder)["report"] and not (folder / "report").exists()


def test_rankings_soft_labels_and_adapters(run: Run) -> None:
    rankings = [
        {"prompt": f"w{n}", "answers": [" w1 w2", f" w{n} w50", " w55"][: 2 + n % 2], "scores": [3, 1, 2][: 2 + n % 2]} for n in range(40)
    ]
    labelled = [{"prompt": f"w{n}", "response_a": " w1", "response_b": " w50", "p": [0.9, 0.5, 0.2][n % 3]} for n in range(40)]
    for rows in (rankings, labelled):
        for ranking in ("plackett_luce", "all_pairs"):
            folder = run(f"reward_model.ranking={ranking}", "model.lora={r: 4}", "training.max_steps=6", rows=rows)
            steps = read_metrics(folder / "metrics.jsonl")
            assert steps[-1]["eval/loss"] < steps[0]["eval/loss"] and no_nan(folder)
            assert (folder / "export" / "model" / "adapter" / "adapter_config.json").is_file()


def test_margins_of_the_data_are_used_only_where_asked(run: Run) -> None:
    rows = [row | {"margin": 3.0} for row in GOOD]
    first = [
        read_metrics(run(f"reward_model.margins={on}", "training.max_steps=1", rows=rows) / "metrics.jsonl")[1]["loss"]
        for on in ("true", "false")
    ]
    assert first[0] > first[1] + 1


def test_ppo_takes_it_as_reward_and_as_value_model(
    run: Run, tiny_model: Path, tiny_run: Callable[[Path], dict[str, Any]], rlhf_dist_ppo: Callable[..., Path], tmp_path: Path
) -> None:
    """The policy pads with a token that stands in texts, so the reward model has got a pad of its own, and one id more."""
    AutoTokenizer.from_pretrained(tiny_model, pad_token="<unk>").save_pretrained(tmp_path / "policy")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "policy")
    made = run(f"model.model={tmp_path / 'policy'}", "training.max_steps=2") / "export" / "model"
    values = tiny_run(tmp_path)
    values["policy"]["model"] = str(tmp_path / "policy")
    values["value"] |= {"model": str(made), "head_init": "keep"}
    values["reward"]["sources"] = [{"name": "liked", "kind": "model", "model": str(made)}]
    checked = check_run(PPOConfig.model_validate(values))
    assert checked["rewards"] == "liked"
    step = read_metrics(rlhf_dist_ppo(values, "run.steps=1", "data.eval_fraction=0") / "metrics.jsonl")[-1]
    reward, policy = load_tokenizer(str(made)), load_tokenizer(str(tmp_path / "policy"))
    assert same_tokenizer(reward, policy) and len(reward) == len(policy) + 1
    assert step["rewards/liked_truncated"] == 0.0 and math.isfinite(step["objective/scores"])


def refusal(run: Run, capsys: pytest.CaptureFixture[str], *overrides: str, **given: Any) -> str:
    """The one message that a run ends with, and status 2."""
    with pytest.raises(SystemExit) as ended:
        run(*overrides, **given)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("error: ") == 1 and "Traceback" not in error
    return error


FAULTS = {
    "chosen equals rejected": GOOD[0] | {"rejected": GOOD[0]["chosen"]},
    "empty completion": GOOD[0] | {"chosen": " "},
    "holds the pad token": GOOD[0] | {"chosen": " w1 <pad>"},
}
RANKINGS = [{"prompt": f"w{n}", "answers": [" w1", " w2", " w3"], "ranks": [1, 3, 2]} for n in range(20)]
LABELS = [{"prompt": f"w{n}", "response_a": " w1", "response_b": " w2", "label": "a"} for n in range(20)]
OTHER_FAULTS = {
    "ties in the ranking": (RANKINGS, RANKINGS[0] | {"ranks": [1, 1, 2]}),
    "one answer": (RANKINGS, RANKINGS[0] | {"answers": [" w1"], "ranks": [1]}),
    "label outside the options": (LABELS, LABELS[0] | {"label": "c"}),
}
EVERY_FAULT = {reason: (GOOD, row) for reason, row in FAULTS.items()} | OTHER_FAULTS


@pytest.mark.parametrize("reason", EVERY_FAULT)
def test_a_faulty_row_stops_with_its_place_or_is_dropped_and_counted(run: Run, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    good, bad = EVERY_FAULT[reason]
    rows = [*good, bad]
    assert f"rows.jsonl:{len(rows)}\n" in refusal(run, capsys, rows=rows)
    folder = run("data.faults=drop", "training.max_steps=1", rows=rows)
    assert summary_of(folder)["rows"][f"dropped: {reason}"] == 1 and no_nan(folder)
    assert f"dropped: {reason}" in capsys.readouterr().out


LONG = {"prompt": "w1 " * 5000, "chosen": " w1", "rejected": " w2 w3"}


def test_a_dialogue_that_exceeds_the_context(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*GOOD, LONG]
    error = refusal(run, capsys, "data.max_tokens=128", rows=rows)
    assert "the row has 5004 tokens, the limit is 128" in error and "rows.jsonl:121" in error
    for policy, fate in (
        ("drop", "dropped: longer than data.max_tokens"),
        ("truncate", "cut: prompts shortened at the front to data.max_tokens"),
    ):
        folder = run("data.max_tokens=128", f"data.overlong={policy}", "training.max_steps=8", rows=rows)
        counts = summary_of(folder)["rows"]
        assert counts[fate] == 1 and counts["train"] + counts["eval"] == (120 if policy == "drop" else 121) and no_nan(folder)


def test_a_file_of_two_layouts_stops_whatever_the_policy(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for policy in ("error", "drop"):
        assert "rows.jsonl:21" in refusal(run, capsys, f"data.faults={policy}", rows=[*LABELS, RANKINGS[0]])


CHAT = [{"messages": [{"role": "user", "content": "w1"}], "chosen": " w1", "rejected": " w2"}] * 3
PACKED = gzip.compress(lines(GOOD))


@pytest.mark.parametrize(
    ("rows", "name", "overrides", "message"),
    [
        (CHAT, "rows.jsonl", (), "no chat template"),
        (PACKED[: len(PACKED) // 2], "rows.jsonl.gz", (), "rows.jsonl.gz"),
        (lines(GOOD[:3]) + b'{"prompt": "\xff\xfe"}\n', "rows.jsonl", (), "rows.jsonl:4"),
        ([{"prompt": "w1", "completion": " w2"}], "rows.jsonl", (), "give files with chosen and rejected"),
        (GOOD, "rows.jsonl", ("data.max_tokens=1000",), "do not fit the model's context of 128"),
        (GOOD, "rows.jsonl", ("data.max_tokens=5", "data.overlong=drop"), "no row is left to train on"),
        (GOOD, "rows.jsonl", ("model.model=/nowhere",), "no model folder"),
        (GOOD, "rows.jsonl", ("model.dtype=fp16",), "fp16"),
        (GOOD, "rows.jsonl", ("model.quantize=nf4", "model.lora={r: 4}"), "inputs"),
    ],
    ids=["no chat template", "truncated gzip", "not UTF-8", "demonstrations", "context", "nothing left", "no model", "fp16", "4 bits"],
)
def test_bad_input_ends_with_status_2_and_one_message(
    run: Run, capsys: pytest.CaptureFixture[str], rows: Any, name: str, overrides: tuple[str, ...], message: str
) -> None:
    assert message in refusal(run, capsys, *overrides, rows=rows, name=name)
