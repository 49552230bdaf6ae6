"""Whatever is done to a config: it is read as it stands, or refused with one message that can be printed."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_dist.cli.main import main
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.sft import SFTConfig

SFT: dict[str, Any] = {"run": {"name": "s"}, "data": {"train": "d.jsonl"}, "model": {"model": "m", "ranks": 2, "optim": {"lr": 0.001}}}
PLACES = [
    (),
    ("run",),
    ("run", "name"),
    ("data",),
    ("data", "train"),
    ("model",),
    ("model", "ranks"),
    ("model", "optim"),
    ("model", "optim", "lr"),
]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), inner, max_size=2),
    max_leaves=5,
)


def shown(path: Path) -> tuple[int, str, str]:
    """`rlhf-dist config show`: status, output, error."""
    out, told = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(told):
        try:
            main(["config", "show", "--config", str(path)])
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), told.getvalue()
    return 0, out.getvalue(), told.getvalue()


def changed(place: tuple[str, ...], value: Any) -> Any:
    if not place:
        return value
    values = yaml.safe_load(yaml.safe_dump(SFT))
    node = values
    for name in place[:-1]:
        node = node[name]
    node[place[-1]] = value
    return values


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(PLACES), ODD)
def test_odd_values(tmp_path: Path, place: tuple[str, ...], value: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(place, value)), encoding="utf-8")
    status, out, told = shown(path)
    assert (status, "Traceback" in told) in ((0, False), (2, False)), told
    assert bool(out) == (status == 0) and told.startswith("error:") == (status == 2)
    if status == 0:  # what is shown is what was given, and reads as the same
        again = tmp_path / "again.yaml"
        again.write_text(out, encoding="utf-8")
        assert shown(again) == (0, out, "")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=12), st.integers(0, 200), st.integers(0, 40))
def test_damaged_text(tmp_path: Path, put: bytes, at: int, cut: int) -> None:
    content = yaml.safe_dump(SFT).encode()
    (tmp_path / "run.yaml").write_bytes(content[:at] + put + content[at + cut :])
    status, _, told = shown(tmp_path / "run.yaml")
    assert status in (0, 2) and "Traceback" not in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {name: a, name: b}", "'name' comes twice"),
        ("model: {optim: {lr: .inf}}", "finite number"),
        ("model: {optim: {lr: true}}", "lr is true, and should be a number"),
        ("model: {ranks: yes}", "ranks is true, and should be a number"),
        ("model: {ranks: 99999999999999999999}", "ranks is too large a number"),
        ("1: a", "Keys should be strings"),
        ("{null: a, run: {}}", "Keys should be strings"),
        ("a: 2020-13-45", "month must be in"),
        ("[" * 1000, "levels deep"),
    ],
)
def test_what_was_taken_or_fell_over(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        load_config(SFTConfig, path)
    assert shown(path)[0] == 2


@pytest.mark.parametrize(
    "override",
    [
        "reward.sources.0.name.x.y=1",
        "reward.sources.²=1",
        "reward.sources.x.y=1",
        "run.steps=" + "9" * 5000,
        "run.seed=2020-13-45",
        "run=[[",
    ],
)
def test_odd_overrides(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("reward: {sources: [{kind: function, name: f, path: 'a:b'}]}\n", encoding="utf-8")
    with pytest.raises(UserError):
        load_config(PPOConfig, path, [override])


@settings(max_examples=50, deadline=None)
@given(st.text("run.stepsa0=[]{}:1,&*!-\n\0²", max_size=20))
def test_any_override(override: str) -> None:
    with pytest.raises(UserError):  # the sections that have no default are missing
        load_config(PPOConfig, None, [override])
