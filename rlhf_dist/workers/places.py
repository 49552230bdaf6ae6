"""Where this process and its weights are, in words that two processes can compare."""

from __future__ import annotations

import ray
import torch

from rlhf_dist.contracts.weights import Place

LOOPBACK = "127.0.0.1"


def place_of(device: torch.device) -> Place:
    """The place of weights on a device of this process."""
    name = "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    return Place(node_id(), name, ray.util.get_node_ip_address() if ray.is_initialized() else LOOPBACK)


def node_id() -> str:
    """Ray's name of this node, a machine or a container, whose processes can map each other's memory; empty without Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
