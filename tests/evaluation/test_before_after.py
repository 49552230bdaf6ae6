from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.evaluation.before_after import Comparison, compare, representative
from rlhf_dist.evaluation.interval import clustered_mean
from rlhf_dist.runs.rollout_log import write_rollouts

Row = tuple[int, int, float | None]


def write(path: Path, rows: Sequence[Row], text: str = "prompt", **details: list[Any]) -> Path:
    """An evaluation file with (prompt id, sample index, score) rows; the completion names the file and the row."""
    count = len(rows)
    mask = torch.ones(count, 2, dtype=torch.bool)
    batch = ExperienceBatch(
        prompt_tokens_BP=torch.ones(count, 1, dtype=torch.long),
        prompt_mask_BP=torch.ones(count, 1, dtype=torch.bool),
        response_tokens_BT=torch.ones(count, 2, dtype=torch.long),
        response_mask_BT=mask,
        response_attention_BT=mask,
        prompt_id_B=torch.tensor([row[0] for row in rows]),
        sample_index_B=torch.tensor([row[1] for row in rows]),
        policy_version_B=torch.zeros(count, dtype=torch.long),
        stop_reason_B=torch.zeros(count, dtype=torch.long),
        rollout_logprobs_BT=torch.zeros(count, 2),
        prompts=tuple(f"{text} {row[0]}" for row in rows),
        completions=tuple(f"{path.stem} {row[0]}.{row[1]}" for row in rows),
    )
    write_rollouts(path, batch, {"score": [row[2] for row in rows], **details})
    return path


def both(folder: Path, before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    return compare(write(folder / "before.parquet", before), write(folder / "after.parquet", after))


def test_pairs_meet_by_prompt_and_sample_whatever_the_order(tmp_path: Path) -> None:
    before: list[Row] = [(1, 0, 0.1), (1, 1, 0.2), (2, 0, 0.3)]
    after: list[Row] = [(2, 0, 0.9), (1, 1, 0.6), (1, 0, 0.4)]
    comparison = both(tmp_path, before, after)
    assert [(p.prompt, p.before, p.after, p.score_before, p.score_after) for p in comparison.pairs] == [
        ("prompt 1", "before 1.0", "after 1.0", 0.1, 0.4),
        ("prompt 1", "before 1.1", "after 1.1", 0.2, 0.6),
        ("prompt 2", "before 2.0", "after 2.0", 0.3, 0.9),
    ]
    assert comparison.unpaired == 0
    assert comparison.differences["score"] == clustered_mean([0.4 - 0.1, 0.6 - 0.2, 0.9 - 0.3], [1, 1, 2])
    assert comparison.before.score.mean == pytest.approx((0.15 + 0.3) / 2)


def test_pairing_finds_a_small_gain_that_the_two_intervals_hide(tmp_path: Path) -> None:
    rows = [(i, 0, float(i)) for i in range(10)]
    result = both(tmp_path, rows, [(i, s, score + 0.5 + 0.01 * (i % 3)) for i, s, score in rows])
    before, after, change = result.before.score, result.after.score, result.differences["score"]
    assert before.high is not None and after.low is not None and change.low is not None
    assert before.high > after.low and change.low > 0.4


def test_what_has_no_partner_is_counted_and_in_no_difference(tmp_path: Path) -> None:
    comparison = both(tmp_path, [(1, 0, 0.0), (2, 0, None), (3, 0, 5.0)], [(1, 0, 1.0), (2, 0, 9.0), (4, 0, 5.0)])
    assert comparison.unpaired == 2 and len(comparison.pairs) == 2
    assert comparison.differences["score"].mean == 1.0 and comparison.differences["score"].n == 1
    assert comparison.before.missing == {"score": 1}


def test_every_quantity_is_compared(tmp_path: Path) -> None:
    rows: list[Row] = [(1, 0, 0.0), (2, 0, 1.0)]
    before = write(tmp_path / "before.parquet", rows, **{"reward/joy": [0.0, None], "reward/old": [1.0, 1.0]})
    after = write(tmp_path / "after.parquet", rows, **{"reward/joy": [1.0, 1.0]})
    comparison = compare(before, after)
    assert set(comparison.differences) == {"score", "rewards/joy", "length", "stop_rate"}
    assert comparison.differences["rewards/joy"].n == 1
    values = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert values["difference"]["rewards/joy"]["mean"] == 1.0 and values["pairs"] == 2


def test_bad_files(tmp_path: Path) -> None:
    row: Row = (1, 0, 0.0)
    good = write(tmp_path / "good.parquet", [row])
    with pytest.raises(UserError, match="1 samples stand twice"):
        compare(good, write(tmp_path / "twice.parquet", [row, row]))
    with pytest.raises(UserError, match="share no sample"):
        compare(good, write(tmp_path / "other.parquet", [(2, 0, 0.0)]))
    with pytest.raises(UserError, match="another text"):
        compare(good, write(tmp_path / "text.parquet", [row], text="changed"))
    with pytest.raises(UserError, match="cannot read"):
        compare(good, tmp_path / "absent.parquet")


def test_the_chosen_samples_span_the_range(tmp_path: Path) -> None:
    gains = {10: 0.3, 11: -0.5, 12: 0.9, 13: 0.0, 14: 0.6}
    # Second samples with wild gains must not be picked: no cherry-picking among the samples of a prompt.
    rows: list[Row] = [(p, s, 0.0) for p in gains for s in (1, 0)]
    after: list[Row] = [(p, s, gains[p] if s == 0 else 100.0) for p in gains for s in (1, 0)]
    chosen = representative(both(tmp_path, rows, after))
    assert [(e.reason, e.pair.prompt_id, e.pair.gain) for e in chosen] == [
        ("largest gain", 12, 0.9),
        ("upper quartile", 14, 0.6),
        ("median", 10, 0.3),
        ("lower quartile", 13, 0.0),
        ("smallest gain", 11, -0.5),
    ]
    json.dumps([e.to_dict() for e in chosen], allow_nan=False)


def test_the_choice_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    before: list[Row] = [(p, 0, 0.0) for p in range(40)]
    after: list[Row] = [(p, 0, float(p // 7)) for p in range(40)]  # many ties
    forward = representative(both(tmp_path, before, after))
    assert representative(both(tmp_path, before[::-1], after[::-1])) == forward
    assert len({e.pair.prompt_id for e in forward}) == 5


@pytest.mark.parametrize(
    ("prompts", "reasons"),
    [(1, ["largest gain"]), (2, ["largest gain", "smallest gain"]), (3, ["largest gain", "median", "smallest gain"])],
)
def test_few_prompts_stand_once(tmp_path: Path, prompts: int, reasons: list[str]) -> None:
    chosen = representative(both(tmp_path, [(p, 0, 0.0) for p in range(prompts)], [(p, 0, float(p)) for p in range(prompts)]))
    assert [e.reason for e in chosen] == reasons


def test_a_first_sample_without_score_gives_way_to_the_next(tmp_path: Path) -> None:
    comparison = both(tmp_path, [(1, 0, None), (1, 1, 0.0), (2, 0, 0.0)], [(1, 0, 1.0), (1, 1, 2.0), (2, 0, None)])
    assert [(e.pair.prompt_id, e.pair.sample_index) for e in representative(comparison)] == [(1, 1)]
