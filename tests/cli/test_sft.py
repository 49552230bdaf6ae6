"""`rlhf-dist sft` end to end in one plain process: what it learns, what it leaves, what it refuses."""

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
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.cli.main import main
from rlhf_dist.runs.metrics import read_metrics

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wN` is answered by `wN wN`: easy to learn."""
    path = tmp_path_factory.mktemp("demonstrations") / "rows.jsonl"
    rows = [{"prompt": f"w{n % 60} w{(7 * n) % 60}", "completion": f" w{n % 60} w{n % 60}"} for n in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def values(tiny_model: Path, demonstrations: Path) -> dict[str, Any]:
    return {
        "data": {"train": str(demonstrations), "eval_fraction": 0.2, "max_tokens": 32},
        "model": {"model": str(tiny_model), "optim": {"lr": 1e-2}},
        "training": {"epochs": 3, "batch_size": 16},
        "placement": {"launcher": "spmd"},
    }


@pytest.fixture(scope="module")
def run(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    def run(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("sft")
        path = folder / "sft.yaml"
        path.write_text(yaml.safe_dump(values))
        main(["sft", "--config", str(path), f"run.output_dir={folder}", *overrides])
        return folder / "sft"

    return run


@pytest.fixture(scope="module")
def finished(run: Run) -> Path:
    return run()


def test_it_learns_and_says_so(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    before, after = lines[0], lines[-1]
    assert after["eval/loss"] < 0.8 * before["eval/loss"]
    assert after["eval/perplexity"] == pytest.approx(math.exp(after["eval/loss"]))
    assert [line["step"] for line in lines] == list(range(len(lines))) and after["epoch"] == 3.0
    assert {"loss", "lr", "grad_norm", "perf/tokens_per_second"} <= after.keys()
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["before"]["eval/loss"] == before["eval/loss"] and summary["after"]["eval/loss"] == after["eval/loss"]
    assert summary["rows"]["train"] + summary["rows"]["eval"] == 120 and summary["stage"] == "sft"


def test_the_model_and_the_best_one_load_with_transformers(finished: Path) -> None:
    for name in ("model", "best"):
        model = AutoModelForCausalLM.from_pretrained(finished / "export" / name)
        tokenizer = AutoTokenizer.from_pretrained(finished / "export" / name)
        assert model.config.vocab_size == len(tokenizer)


def test_it_is_deterministic_and_does_not_depend_on_the_cut(finished: Path, run: Run) -> None:
    losses = [line["loss"] for line in read_metrics(finished / "metrics.jsonl")[1:]]
    again = [line["loss"] for line in read_metrics(run("model.microbatch_tokens=16") / "metrics.jsonl")[1:]]
    assert again == pytest.approx(losses, rel=1e-4)


def test_packed_rows_learn_the_same(finished: Path, run: Run) -> None:
    """In microbatches of more rows than padding would leave room for."""
    folders = finished, run("model.packing=true", "model.microbatch_tokens=90")
    padded, packed = ([line for line in read_metrics(folder / "metrics.jsonl") if line["step"]] for folder in folders)
    assert packed[0]["grad_norm"] == pytest.approx(padded[0]["grad_norm"], rel=1e-5)
    for name in ("loss", "eval/loss"):
        curves = [[line[name] for line in lines if name in line] for lines in (packed, padded)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4) and len(curves[0]) >= 3


def test_an_architecture_that_cannot_be_packed_is_refused(tiny_model: Path, run: Run, tmp_path: Path, capsys: Any) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    size = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    OPTForCausalLM(OPTConfig(vocab_size=64, **size)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run("model.packing=true", f"model.model={tmp_path}")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "OPTForCausalLM cannot be packed" in err and str(tmp_path) in err and "packing: false" in err


def test_adapters_and_steps_within_an_epoch(run: Run) -> None:
    lines = read_metrics(run("model.lora={r: 4}", "training.max_steps=4", "training.evaluate_every=2") / "metrics.jsonl")
    assert len(lines) == 5 and [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]


@pytest.mark.parametrize("stage", [0, 3])
def test_over_4_bits_it_learns_and_its_export_and_adapter_load(run: Run, wide_model: Path, tmp_path: Path, stage: int) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    given = (f"model.model={wide_model}", "model.quantize=nf4", "model.lora={r: 4}", f"model.deepspeed={tmp_path / 'zero.json'}")
    folder = run(*given, "training.max_steps=6")
    lines = read_metrics(folder / "metrics.jsonl")
    assert lines[-1]["eval/loss"] < 0.9 * lines[0]["eval/loss"]
    export = folder / "export" / "model"
    assert AutoModelForCausalLM.from_pretrained(export).dtype == torch.float32
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide_model), str(export / "adapter"))
    assert adapted.peft_config["default"].base_model_name_or_path == str(wide_model)


def test_an_adapter_is_a_model_to_start_from(run: Run, finished: Path, tiny_model: Path) -> None:
    """Half a run with an adapter; the other half begins where it ended, with an adapter on the adapter."""
    first = run("model.lora={r: 4}", "training.epochs=1")
    second = run("model.lora={r: 2}", f"model.model={first / 'export' / 'model' / 'adapter'}", "training.epochs=1")
    ended, began = (read_metrics(folder / "metrics.jsonl")[at]["eval/loss"] for folder, at in ((first, -1), (second, 0)))
    assert began == pytest.approx(ended, rel=1e-4)
    both = json.loads((second / "export" / "model" / "adapter" / "adapter_config.json").read_text())
    assert both["base_model_name_or_path"] == str(tiny_model) and both["r"] == 6


def test_long_rows_are_dropped_or_cut_and_counted(run: Run) -> None:
    for policy, key in (("drop", "dropped: longer than data.max_tokens"), ("truncate", "cut: longer than data.max_tokens")):
        folder = run("data.max_tokens=5", f"data.overlong={policy}", "training.max_steps=1") if policy == "truncate" else None
        if folder is not None:
            assert json.loads((folder / "summary.json").read_text())["rows"][key] == 120


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.max_tokens=5",), "rows.jsonl:1.*|the row has 6 tokens, the limit is 5"),
        (("data.max_tokens=1000",), "do not fit the model's context of 128"),
        (("model.model=/nowhere",), "no model folder"),
        (("data.max_tokens=5", "data.overlong=drop"), "no row is left to train on"),
        (("data.train=/nowhere.jsonl",), "nowhere.jsonl"),
        (("model.quantize=nf4", "model.lora={}"), r"the layer model\.layers\.0\.self_attn\.q_proj has 32 inputs"),
    ],
)
def test_bad_input_ends_with_status_2(run: Run, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*overrides)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


PLAIN = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def chats(model: Path, folder: Path, template: str | None) -> tuple[str, ...]:
    """Overrides: ten short chats, one of them asking `w1`, and the model with this template."""
    made, path = shutil.copytree(model, folder / "model"), folder / "chats.jsonl"
    if template is not None:
        (made / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w20"}]} for n in range(1, 11)]
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


def test_a_template_that_cuts_earlier_turns_leaves_two_remedies_that_work(
    run: Run, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = PLAIN.replace("{{ m['content'] }} ", "{% if loop.last %}{{ m['content'] }} </s> {% else %}w9 {% endif %}")
    given = chats(tiny_model, tmp_path, cuts.replace("{% if loop", "{% if m['role'] == 'user' %}{{ m['content'] }} {% elif loop"))
    assert read_metrics(run(*given, "training.max_steps=1") / "metrics.jsonl"), "rows with one answer each"
    turns = [{"role": role, "content": f"w{n}"} for n, role in enumerate(["user", "assistant"] * 2)]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": [*turns[:3], turns[3] | {"content": f"w{n}"}]}) + "\n" for n in range(9))
    )
    with pytest.raises(SystemExit):
        run(*given)
    said = capsys.readouterr().err
    assert "sft.loss_on=all" in said and "one answer each" in said
    assert read_metrics(run(*given, "sft.loss_on=all", "data.eval_fraction=0", "training.max_steps=1") / "metrics.jsonl")
