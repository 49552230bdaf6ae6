"""`rlhf-dist dpo` end to end in one plain process: what it learns, what it leaves, what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.cli.main import main
from rlhf_dist.runs.metrics import read_metrics

Run = Callable[..., Path]
NAMES = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
GOOD = {"prompt": "w1 w3", "chosen": " w2", "rejected": " w5"}


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def values(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """w2, w4 and w6 are better than w3, w5 and w7, whatever was asked."""
    rows = [
        {
            "prompt": f"w{n % 60} w{7 * n % 60}",
            "chosen": f" w{2 + 2 * (n % 3)}" * (1 + n % 4),
            "rejected": f" w{3 + 2 * (n % 3)}" * (1 + n % 2),
        }
        for n in range(90)
    ]
    return {
        "data": {"train": write(tmp_path_factory.mktemp("pairs"), rows), "eval_fraction": 0.2, "max_tokens": 32},
        "model": {"model": str(tiny_model), "optim": {"lr": 3e-3}},
        "training": {"epochs": 3, "batch_size": 16},
        "placement": {"launcher": "spmd"},
    }


@pytest.fixture(scope="module")
def run(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    def run(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("dpo")
        path = folder / "dpo.yaml"
        path.write_text(yaml.safe_dump(values))
        main(["dpo", "--config", str(path), f"run.output_dir={folder}", *overrides])
        return folder / "dpo"

    return run


@pytest.fixture(scope="module")
def finished(run: Run) -> Path:
    return run()


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def test_it_learns_and_says_so(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    first, after = lines[1], lines[-1]
    assert f"{lines[0]['eval/loss']:.6f}" == f"{first['loss']:.6f}" == "0.693147"
    assert first.keys() >= NAMES and {f"eval/{name}" for name in NAMES} <= lines[0].keys() & after.keys()
    assert abs(first["rewards/margins"]) < 1e-6 and lines[0]["eval/rewards/accuracies"] == 0.5
    assert after["rewards/margins"] > 1 and after["rewards/accuracies"] > 0.9 and after["rewards/chosen"] > after["rewards/rejected"]
    assert after["eval/loss"] < 0.5 and after["eval/rewards/accuracies"] > 0.8, "it holds for prompts it has not seen"
    found = summary(finished)
    assert found["stage"] == "dpo" and found["rows"]["train"] + found["rows"]["eval"] == 90
    assert found["reference"].keys() == {"logps/chosen", "logps/rejected"} and found["reference"]["logps/chosen"] < 0


def test_the_model_loads_with_transformers_and_prefers_the_chosen(finished: Path, tiny_model: Path) -> None:
    def odds(folder: Path) -> float:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logprobs = model(tokenizer("w6 w12", return_tensors="pt")["input_ids"]).logits[0, -1].log_softmax(-1)
        return float(logprobs[[6, 8, 10]].logsumexp(0) - logprobs[[7, 9, 11]].logsumexp(0))

    assert odds(finished / "export" / "model") > odds(tiny_model) + 0.5
    assert (finished / "export" / "best" / "model.safetensors").is_file()


def test_what_is_seen_while_it_works(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("training.max_steps=2")
    shown = capsys.readouterr().out
    assert re.search(r"step 1/2 .*loss 0\.6931 .*accuracy 0\.\d{3} .*margin -?0\.000", shown)
    assert "everything of this run" in shown


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        (("dpo.loss=hinge",), 1.0),
        (("dpo.loss=ipo", "dpo.beta=0.5"), 1.0),
        (("dpo.loss=ipo", "dpo.beta=0.1"), 25.0),
        (("dpo.label_smoothing=0.1",), math.log(2)),
        (("dpo.loss=robust", "dpo.label_smoothing=0.1"), math.log(2)),
    ],
)
def test_every_loss_starts_where_it_must_and_falls(run: Run, overrides: tuple[str, ...], first: float) -> None:
    lines = read_metrics(run("training.max_steps=6", "model.optim.lr=1e-3", *overrides) / "metrics.jsonl")
    assert lines[0]["eval/loss"] == pytest.approx(first, rel=1e-6) and lines[1]["loss"] == pytest.approx(first, rel=1e-5)
    assert lines[-1]["loss"] < lines[1]["loss"] and lines[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("changes", [("model.microbatch_tokens=24",), ("model.packing=true",)], ids=["small cuts", "packed"])
def test_it_does_not_depend_on_the_cut(finished: Path, run: Run, changes: tuple[str, ...]) -> None:
    losses = [line["loss"] for line in read_metrics(finished / "metrics.jsonl")[1:]]
    again = [line["loss"] for line in read_metrics(run(*changes) / "metrics.jsonl")[1:]]
    assert again == pytest.approx(losses, rel=1e-4)


def test_adapters(run: Run) -> None:
    lines = read_metrics(run("model.lora={r: 8}", "model.optim.lr=2e-2") / "metrics.jsonl")
    assert f"{lines[1]['loss']:.6f}" == "0.693147" and lines[-1]["eval/loss"] < 0.6


def test_another_model_as_reference(finished: Path, run: Run) -> None:
    """The trained model measured to the model it came from starts where the first run ended, and the other way about it loses."""
    trained = finished / "export" / "model"
    before, after = summary(finished)["before"], summary(finished)["after"]
    again = read_metrics(run(f"model.model={trained}", f"reference.model={yaml_model(finished)}", "training.max_steps=1") / "metrics.jsonl")
    assert again[0]["eval/loss"] == pytest.approx(after["eval/loss"], rel=1e-5)
    assert again[0]["eval/rewards/margins"] == pytest.approx(after["eval/rewards/margins"], rel=1e-4)
    behind = read_metrics(run(f"reference.model={trained}", "training.max_steps=1") / "metrics.jsonl")
    assert behind[0]["eval/rewards/margins"] == pytest.approx(-after["eval/rewards/margins"], rel=1e-4)
    assert behind[0]["eval/logps/chosen"] == pytest.approx(before["eval/logps/chosen"], rel=1e-6)


def yaml_model(folder: Path) -> str:
    return str(yaml.safe_load((folder / "config.yaml").read_text())["model"]["model"])


def test_what_is_dropped_or_cut_is_counted(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n} w1 w1 w1", "chosen": " w2" * (2 + n % 2), "rejected": " w3"} for n in range(20)]
    rows += [GOOD | {"rejected": " w2"}, GOOD | {"chosen": " "}, GOOD | {"chosen": " zzz", "rejected": " yyy"}]
    path = write(tmp_path, rows)
    given = (f"data.train={path}", "data.faults=drop", "data.eval_fraction=0", "data.max_tokens=8", "training.max_steps=1")
    dropped = summary(run(*given, "data.overlong=drop"))["rows"]
    assert dropped["train"] == 10 and dropped["dropped: longer than data.max_tokens"] == 10
    assert dropped["dropped: chosen equals rejected"] == dropped["dropped: empty completion"] == 1
    assert dropped["dropped: answers of the same tokens"] == 1, "two words that the tokenizer does not know"
    cut = summary(run(*given, "data.overlong=truncate"))["rows"]
    assert cut["train"] == 20 and cut["cut: prompts shortened at the front to data.max_tokens"] == 10


BAD_ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "equal": ([GOOD, GOOD | {"rejected": " w2"}], r"pairs.jsonl:2.*|chosen and rejected are the same text"),
    "empty": ([GOOD, GOOD | {"rejected": "  "}], r"the rejected is empty"),
    "mixed": ([GOOD, {"prompt": "w1", "completion": " w2"}], r"pairs.jsonl:2"),
    "prompts": ([{"prompt": "w1"}, {"prompt": "w2"}], r"preferences"),
    "overlong": ([GOOD, GOOD | {"chosen": " w2" * 40}], r"the row has 44 tokens, the limit is 32"),
    "no template": (
        [{"messages": [{"role": "user", "content": "w1"}], "chosen": " w2", "rejected": " w3"}],
        r"no chat template",
    ),
    "ties": ([{"prompt": "w1", "answers": [" w2", " w3"], "scores": [1, 1]}], r"two answers have the same of scores"),
    "label": ([{"prompt": "w1", "response_a": " w2", "response_b": " w3", "label": "c"}], r"the label is 'c'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_ends_with_status_2_and_its_line(run: Run, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, message = BAD_ROWS[name]
    with pytest.raises(SystemExit) as ended:
        run(f"data.train={write(tmp_path, rows)}", "data.eval_fraction=0")
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, shown) and "pairs.jsonl" in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.max_tokens=1000",), "do not fit the model's context of 128"),
        (("model.model=/nowhere",), "no model folder"),
        (("reference.model=/nowhere",), "no model folder"),
        (("data.max_tokens=3", "data.overlong=drop"), "no row is left to train on"),
        (("dpo.label_smoothing=0.5",), "dpo.label_smoothing"),
        (("dpo.loss=hinge", "dpo.label_smoothing=0.1"), "hinge knows no label_smoothing"),
    ],
)
def test_bad_settings_end_with_status_2(run: Run, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*overrides)
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_a_reference_with_another_vocabulary_is_refused(
    run: Run, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text((tiny_model / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit):
        run(f"reference.model={tmp_path}")
    assert "the reference model has another vocabulary" in capsys.readouterr().err


PLAIN = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def chats(model: Path, folder: Path, template: str | None) -> tuple[str, ...]:
    """Overrides: ten short chats, one of them asking `w1`, and the model with this template."""
    made, path = shutil.copytree(model, folder / "model"), folder / "chats.jsonl"
    if template is not None:
        (made / "chat_template.jinja").write_text(template)
    rows = [{"prompt": [{"role": "user", "content": f"w{n}"}], "chosen": "w20", "rejected": "w21"} for n in range(1, 11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"model.model={made}", f"data.train={path}"


TEMPLATES = {
    "none": (None, "no chat template"),
    "syntax": ("{% for m in messages %}{{ m", "is broken.*mend chat_template in the model folder"),
    "undefined": ("{{ messages[0].a.b }}", "is broken.*mend chat_template in the model folder"),
    "refuses": ("{{ raise_exception('not this one') }}", "refuses the messages: not this one.*data.faults=drop"),
    "opens": (PLAIN.replace("assistant {% endif", "assistant w9 {% endif"), "asks for an answer with 'assistant w9 '"),
    "anew": ("{{ messages | length }} " + PLAIN, "renders earlier turns anew"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_cannot_be_used_ends_with_status_2(
    run: Run, tiny_model: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    template, message = TEMPLATES[case]
    with pytest.raises(SystemExit) as ended:
        run(*chats(tiny_model, tmp_path, template))
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize("fraction", ["0", "0.5"])
def test_chats_that_the_template_refuses_are_left_out_and_counted(run: Run, tiny_model: Path, tmp_path: Path, fraction: str) -> None:
    refuses = "{% if messages[0]['content'] == 'w1' %}{{ raise_exception('no w1') }}{% endif %}" + PLAIN
    given = chats(tiny_model, tmp_path, refuses)
    folder = run(*given, "data.faults=drop", "training.max_steps=1", f"data.eval_fraction={fraction}")
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert rows["dropped: refused by the chat template"] == 1 and rows["train"] + rows["eval"] == 9
    first = read_metrics(folder / "metrics.jsonl")[0]
    assert first["step"] == (fraction == "0") and len(first) > 2, "no empty line of a side that is not there"
