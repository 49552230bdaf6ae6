"""Capsules: what was written comes back bit for bit, NaN included; what is damaged is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.data.token_rows import TokenRow
from rlhf_dist.runs.capsule import Capsule, Facts, Part, read_capsule, seal, total, write_part
from rlhf_dist.runs.capsule_rows import NumberedRow

FACTS = Facts("ppo", "policy", "loss", 12.5, math.nan, 1e-6)
PARTS = (Part(((0, 1), (2,)), (0.1 + 0.2, math.nan)), Part(((0,),), (-math.inf,)), Part((), ()))


def experience() -> ExperienceBatch:
    """Four rows of three prompt tokens and up to four response tokens; a column that JSON would not give back."""
    mask_BT = torch.arange(4) < torch.tensor([4, 1, 3, 2])[:, None]
    yes_BP, count_B = torch.ones(4, 3, dtype=torch.bool), torch.arange(4)
    tokens = torch.arange(12).view(4, 3), yes_BP, torch.arange(16).view(4, 4), mask_BT, mask_BT
    texts = tuple(f"prompt {row}" for row in range(4)), ("a", "b", "c", "d")
    numbers = count_B * 7, count_B, count_B * 0, count_B * 0, torch.zeros(4, 4)
    return ExperienceBatch(*tokens, *numbers, *texts, columns={"odd": ({1},) * 4}, advantages_BT=torch.full((4, 4), math.nan))


@pytest.fixture
def capsule(tmp_path: Path) -> Path:
    """Of three ranks, the last without rows."""
    rows = experience()
    folder = tmp_path / "step_000003_policy_02"
    for rank, (part, chosen) in enumerate(zip(PARTS, ([0, 1, 2], [3], []), strict=True)):
        write_part(folder, rank, part, rows.select(chosen))
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"12345")
    seal(folder, FACTS, 3, "run: {}\n")
    return folder


def test_it_comes_back_as_it_was(capsule: Path) -> None:
    held = read_capsule(capsule)
    assert repr(held.facts) == repr(FACTS) and repr(held.parts) == repr(PARTS) and math.isnan(held.loss)
    rows, want = held.experience(0), experience().select([0, 1, 2])
    assert torch.equal(rows.response_tokens_BT, want.response_tokens_BT) and rows.prompts == want.prompts and rows.columns == {}
    assert rows.advantages_BT is not None and bool(rows.advantages_BT.isnan().all()) and len(held.experience(1)) == 1
    assert not list(capsule.glob("part_*")) and "NaN" not in (capsule / "capsule.json").read_text()


def test_rows_of_a_supervised_stage_come_back_and_are_refused_when_they_were_changed(tmp_path: Path) -> None:
    row = TokenRow(np.array([1, 5, 6], np.int32), np.array([False, True, True]), math.inf)
    write_part(tmp_path, 0, Part(((0,),), (math.inf,)), [NumberedRow(17, row)])
    write_part(tmp_path, 1, Part((), ()), [])
    seal(tmp_path, Facts("sft", "model", "loss", 2.0, math.nan, 0.1), 2, "run: {}\n")
    (found,) = read_capsule(tmp_path).rows(0)
    assert found.number == 17 and found.row.tokens.tolist() == [1, 5, 6] and found.row.token_weight == math.inf  # type: ignore[union-attr]
    assert not (tmp_path / "rows_0001.jsonl").exists()
    (tmp_path / "rows_0000.jsonl").write_text((tmp_path / "rows_0000.jsonl").read_text().replace("17", "18"))
    with pytest.raises(UserError, match=r"rows_0000\.jsonl of the capsule was changed"):
        read_capsule(tmp_path)


def test_the_loss_of_the_step_is_over_all_ranks() -> None:
    assert Capsule(Path(), FACTS, (Part(((0,), (1,)), (1.0, 2.0)), Part(((0,),), (4.0,)))).loss == 7.0 / 12.5
    assert total([1e16, 1.0, -1e16]) == 1.0 and math.isnan(total([math.inf, -math.inf]))
    assert total([1e308, 1e308]) == math.inf


def damage(folder: Path, part: str, by: str) -> None:
    text = (folder / "capsule.json").read_text()
    assert text.count(part) == 1
    (folder / "capsule.json").write_text(text.replace(part, by))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "shard_0001.safetensors").unlink(), "shard_0001.safetensors of the capsule is missing"),
        (lambda f: (f / "model" / "weights").write_bytes(b"12346"), "model/weights of the capsule was changed"),
        (lambda f: (f / "config.yaml").write_text("run: {}\n\n"), "config.yaml of the capsule was changed"),
        (lambda f: (f / "capsule.json").unlink(), "there is no capsule.json"),
        (lambda f: (f / "capsule.json").write_text("{"), "capsule.json cannot be read"),
        (lambda f: (f / "capsule.json").write_text('{"format": 99}'), "capsule of format 99"),
        (lambda f: (f / "capsule.json").write_text("[]"), "capsule.json cannot be read"),
        (lambda f: damage(f, '"-inf"', ""), "capsule.json cannot be read: ValidationError"),
        (lambda f: damage(f, "2\n", "3\n"), "capsule.json cannot be read: ValidationError"),
        (lambda f: damage(f, '"fault": "', '"fault": "odd '), "capsule.json cannot be read: ValidationError"),
        (lambda f: damage(f, "12.5", "0.0"), "capsule.json cannot be read: ValidationError"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_by_name(capsule: Path, change: Callable[[Path], None], words: str) -> None:
    change(capsule)
    with pytest.raises(UserError, match=words) as refused:
        read_capsule(capsule)
    assert refused.value.where == str(capsule) and refused.value.fix
