"""Where weights are, as two processes would compare it."""

import pytest
import ray
import torch

from rlhf_dist.contracts.weights import Place
from rlhf_dist.workers.places import node_id, place_of


def test_without_ray_no_node_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert place_of(torch.device("cpu")) == Place("", "cpu", "127.0.0.1")


@pytest.mark.distributed
def test_under_ray_the_node_has_a_name_and_an_address(ray_session: None) -> None:
    place = place_of(torch.device("cpu"))
    assert place.node == node_id() == ray.nodes()[0]["NodeID"] and place.address == ray.nodes()[0]["NodeManagerAddress"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_a_name_in_the_world() -> None:
    assert len(place_of(torch.device("cuda:0")).device) > 8
