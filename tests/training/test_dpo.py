"""The reference's phase over a group that only answers by number: every row is asked about once, and every rank is told of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_dist.contracts.supervised import PairLogprobs, RowFacts
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.training.dpo import DPO, ask_reference
from rlhf_dist.training.supervised import Setting


class Asked:
    """Ranks that know what the reference says of row n: −n and −n − ½, on the held-out side ten less."""

    name = "model"

    def __init__(self, ranks: int) -> None:
        self.world_size = ranks
        self.asked: Counter[tuple[str, int]] = Counter()
        self.rounds: list[set[int]] = []
        self.kept: list[tuple[Any, Any]] = []

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert len(arguments) == self.world_size
        answers = [getattr(self, method.__name__)(*given) for given in arguments]
        if method.__name__ == "ask_reference":
            self.rounds.append({len(share) for _, share in arguments})
        return answers

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        return list(handles)

    def ask_reference(self, side: str, microbatches: Any) -> tuple[tuple[int, PairLogprobs], ...]:
        rows = [row for cut in microbatches for row in cut]
        self.asked.update((side, row) for row in rows)
        less = 10.0 if side == "eval" else 0.0
        return tuple((row, (-row - less, -row - less - 0.5)) for row in rows)

    def keep_reference(self, train: Any, evaluation: Any) -> None:
        self.kept.append((train, evaluation))


def setting(group: Asked, train: tuple[int, ...], evaluation: tuple[int, ...] = ()) -> Setting:
    return Setting(group, RowFacts(train, (1.0,) * len(train), evaluation), 24, Recorder(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_row_is_asked_about_once_and_every_rank_is_told(ranks: int) -> None:
    group = Asked(ranks)
    said = ask_reference(setting(group, (8, 30, 6, 12, 10), (4, 20)))
    assert group.asked == {("train", n): 1 for n in range(5)} | {("eval", n): 1 for n in range(2)}
    assert all(len(counts) == 1 for counts in group.rounds), "every rank forwards as often: collectives meet"
    train = tuple((-float(n), -n - 0.5) for n in range(5))
    assert group.kept == [(train, ((-10.0, -10.5), (-11.0, -11.5)))] * ranks
    assert said == {"reference": {"logps/chosen": -2.0, "logps/rejected": -2.5}}


def test_no_held_out_rows_nothing_to_ask() -> None:
    group = Asked(2)
    ask_reference(setting(group, (8,)))
    assert group.asked == {("train", 0): 1} and group.kept == [(((0.0, -0.5),), ())] * 2, "fewer rows than ranks"


def test_the_stage_wants_a_small_loss_and_asks_first() -> None:
    assert (DPO.name, DPO.score, DPO.more_is_better, DPO.prepare) == ("dpo", "eval/loss", False, ask_reference)
