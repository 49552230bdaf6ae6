"""Records of a sync travel, and are compared to find out whether two sides are one place."""

import dataclasses
import pickle

import pytest

from rlhf_dist.contracts.weights import BucketInfo, Link, Place, SyncInfo

LINK = Link("ipc", "gloo", "127.0.0.1", 0, 2, 100, 1.0)


@pytest.mark.parametrize("record", [LINK, Place("n", "cpu", "10.0.0.1"), SyncInfo(5), BucketInfo(3, SyncInfo(5, 3, 1))])
def test_records_travel_and_are_frozen(record) -> None:
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.node = "other"  # type: ignore[union-attr]


def test_shared_memory_moves_nothing() -> None:
    assert (SyncInfo(1).bytes, SyncInfo(1).buckets) == (0, 0)


def test_a_link_to_another_port_is_another_link() -> None:
    assert dataclasses.replace(LINK, port=1) != LINK
