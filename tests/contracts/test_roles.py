"""Records that reach the coordinator hold numbers, never tensors (law 7), and roles are found by method name."""

import dataclasses
import inspect
import pickle
import typing

import pytest
from torch import Tensor

from rlhf_dist.contracts import roles
from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.experience import ExperienceBatch, Piece
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.tally import Tally

RECORDS = [kind for _, kind in inspect.getmembers(roles, dataclasses.is_dataclass) if kind.__module__ == roles.__name__]
ROLES = [roles.PolicyRole, roles.ScoringRole, roles.TrainedRole, roles.RewardRole, roles.SamplingRole, roles.RolloutRole]


def mentioned(annotation):
    """All types that stand in an annotation, dataclass fields followed."""
    found = {annotation}
    for inner in typing.get_args(annotation):
        found |= mentioned(inner)
    if dataclasses.is_dataclass(annotation):
        for hint in typing.get_type_hints(annotation).values():
            found |= mentioned(hint)
    return found


def public(role):
    return {name for name, member in inspect.getmembers(role, inspect.isfunction) if not name.startswith("_")}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_no_record_holds_a_tensor_and_all_are_frozen(record):
    assert record.__dataclass_params__.frozen
    assert not mentioned(record) & {Tensor, Piece, ExperienceBatch}


def test_the_walk_would_find_a_tensor():
    assert Tensor in mentioned(Piece) and Tensor in mentioned(list[dict[str, Tensor]])


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.__name__)
def test_only_the_stored_part_of_an_answer_may_hold_tensors(role):
    for name in public(role):
        answer = typing.get_type_hints(getattr(role, name))["return"]
        travels = typing.get_args(answer)[1] if typing.get_origin(answer) is Stored else answer
        assert not mentioned(travels) & {Tensor, Piece, ExperienceBatch}, name


def test_the_policy_can_do_what_scoring_and_trained_roles_can():
    assert public(roles.PolicyRole) >= public(roles.ScoringRole) | public(roles.TrainedRole)
    assert {"generate", "estimate", "sync_weights"} <= public(roles.PolicyRole)
    assert public(roles.PolicyRole) & public(roles.RolloutRole) == {"generate", "place"}


def test_every_role_method_says_what_it_does():
    for role in ROLES:
        for name in public(role):
            assert inspect.getdoc(getattr(role, name)), f"{role.__name__}.{name}"


def test_records_travel_and_do_not_share_their_tallies():
    info = roles.ScoreInfo(rows=(0, 2), results=(), seconds=0.5)
    update = roles.UpdateInfo(tally=Tally(), step=StepInfo(1.0, 1e-6), seconds=0.1)
    for record in (info, update):
        assert pickle.loads(pickle.dumps(record)) == record
    info.tally.add("a", 1, 1)
    assert roles.ScoreInfo(rows=(), results=(), seconds=0.0).tally.sums == {}
