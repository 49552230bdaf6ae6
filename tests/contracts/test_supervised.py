"""The records of the supervised role are small and travel."""

from __future__ import annotations

import pickle

from rlhf_dist.contracts.supervised import RowFacts, SupervisedRole
from rlhf_dist.workers.supervised import SupervisedWorker


def test_facts_travel_with_one_number_a_row() -> None:
    facts = RowFacts(tuple(range(1000)), (1.0,) * 1000, ())
    assert pickle.loads(pickle.dumps(facts)) == facts
    assert len(pickle.dumps(facts)) < 16 * 1000


def test_the_worker_plays_the_role() -> None:
    methods = {name for name in vars(SupervisedRole) if not name.startswith("_")}
    assert methods == {"describe", "update", "evaluate", "export"}
    assert all(callable(getattr(SupervisedWorker, name)) for name in methods)


def test_the_fates_of_the_training_rows_are_those_that_no_held_out_row_met() -> None:
    facts = RowFacts((), (), (), {"dropped: long": 260, "dropped: odd": 2, "cut: x": 1}, {}, {"dropped: long": 60, "cut: x": 1})
    assert facts.train_fates == {"dropped: long": 200, "dropped: odd": 2}
