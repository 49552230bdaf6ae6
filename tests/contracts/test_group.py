"""The group contract, told by the smallest group that keeps it: workers in this process."""

import dataclasses
import inspect
import pickle

import pytest

from rlhf_dist.contracts.group import Handle, Stored, WorkerGroup


class Counter:
    """A role: holds a number."""

    def add(self, amount):
        """Adds and stores."""

    def total(self):
        """A plain answer."""


class CounterWorker:
    """Its worker."""

    def __init__(self):
        self.value = 0

    def add(self, amount):
        self.value += amount
        return Stored(payload=self.value, info=f"+{amount}")

    def total(self):
        return self.value


class Ready:
    """An answer that is there."""

    def __init__(self, answer):
        self.answer = answer

    def info(self):
        return self.answer.info if isinstance(self.answer, Stored) else self.answer

    def payload(self):
        return self.answer.payload if isinstance(self.answer, Stored) else self.answer


class LocalGroup:
    """Runs every rank here, one after another."""

    name = "counter"

    def __init__(self, world_size):
        self.world_size, self.workers = world_size, [CounterWorker() for _ in range(world_size)]

    def submit(self, method, arguments):
        if len(arguments) != self.world_size:
            raise ValueError("one tuple of arguments a rank")
        return [Ready(getattr(w, method.__name__)(*map(self._delivered, a))) for w, a in zip(self.workers, arguments, strict=True)]

    def collect(self, handles):
        return [handle.info() for handle in handles]

    def close(self):
        self.workers = []

    def _delivered(self, argument):
        if isinstance(argument, list | tuple):
            return type(argument)(map(self._delivered, argument))
        return argument.payload() if isinstance(argument, Ready) else argument


def test_the_group_of_this_file_keeps_the_contract():
    for protocol, kind in ((WorkerGroup, LocalGroup), (Handle, Ready)):
        for name, member in inspect.getmembers(protocol, inspect.isfunction):
            if not name.startswith("_"):
                assert list(inspect.signature(getattr(kind, name)).parameters) == list(inspect.signature(member).parameters)


def test_a_method_of_the_role_names_the_call_and_only_records_come_back():
    group = LocalGroup(2)
    handles = group.submit(Counter.add, [(1,), (2,)])
    assert group.collect(handles) == ["+1", "+2"]
    assert group.collect(group.submit(Counter.total, [(), ()])) == [1, 2]


def test_a_handle_among_the_arguments_stands_for_its_payload():
    group = LocalGroup(2)
    first = group.submit(Counter.add, [(10,), (20,)])
    group.submit(Counter.add, [(first[1],), (first[0],)])
    assert group.collect(group.submit(Counter.total, [(), ()])) == [30, 30]


def test_a_stored_answer_is_frozen_and_travels():
    stored = Stored(payload=[1], info="small")
    assert pickle.loads(pickle.dumps(stored)) == stored
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.info = "other"  # type: ignore[misc]
