"""A user error prints what, where and what to do, and survives the trip between processes."""

import copy
import pickle

from rlhf_dist.config.errors import UserError


def test_it_reads_as_one_block_and_leaves_out_what_is_not_known():
    assert str(UserError("it broke")) == "it broke"
    assert str(UserError("it broke", where="a.jsonl:3", fix="mend it")) == "it broke\n  where: a.jsonl:3\n  do:    mend it"


def test_it_survives_pickling_with_its_keyword_fields():
    error = UserError("it broke", where="rank 1, phase update", fix="mend it")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is UserError
        assert (twin.what, twin.where, twin.fix) == ("it broke", "rank 1, phase update", "mend it")
        assert str(twin) == str(error)


class Derived(UserError):
    """A subclass, as other layers may define."""


def test_pickling_keeps_the_subclass():
    twin = pickle.loads(pickle.dumps(Derived("it broke", fix="mend it")))
    assert type(twin) is Derived and twin.fix == "mend it"
