"""How a worker's models leave the device between their turns (contracts.roles.RestingRole)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlhf_dist.contracts.roles import Needs, RestInfo
from rlhf_dist.engines.offload import Parking, own_weights, weight_storages
from rlhf_dist.rollout.vllm import VllmEngine

if TYPE_CHECKING:  # the ranks of a rollout group have models without an engine, and no deepspeed
    from rlhf_dist.engines.deepspeed import DeepSpeedEngine

STAYS = "vLLM has no sleep mode on CPUs: its weights and cache stay in memory"


def rest_engine(engine: DeepSpeedEngine, needs: Needs) -> RestInfo:
    """An engine keeps what the coming phase needs on its device."""
    if needs != "training":
        engine.rest(weights=needs == "nothing")
    return engine.resting


class RestingModel:
    """A model without an engine, whose weights may be off the device. Whoever uses it wakes it first.

    Args:
        model: on its device; nobody else knows its weights yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        own_weights(model)
        self._parking = Parking(next(model.parameters()).device)

    def rest(self) -> None:
        """The weights leave the device."""
        if not self._parking.bytes:
            self._parking.park(weight_storages(self.model).values())

    def wake(self) -> None:
        """They come back."""
        self._parking.restore()

    @property
    def resting(self) -> RestInfo:
        """What is off the device, and how long that has taken."""
        return RestInfo(0, self._parking.bytes, self._parking.seconds)


class SleepingVllm:
    """vLLM's own sleep: its weights go to the host, its key/value cache is given back.

    Args:
        engine: built for it where `sleeps`.
        sleeps: whether it can: on GPUs alone.
    """

    def __init__(self, engine: VllmEngine, sleeps: bool) -> None:
        self._engine, self._sleeps = engine, sleeps
        self._asleep, self._seconds = 0, 0.0

    def rest(self) -> None:
        """Weights and cache leave the device, where they can."""
        if self._sleeps and not self._asleep:
            began, before = time.perf_counter(), torch.cuda.mem_get_info()[0]
            self._engine.sleep()
            self._asleep = max(torch.cuda.mem_get_info()[0] - before, 1)
            self._seconds += time.perf_counter() - began

    def wake(self) -> None:
        """They come back."""
        if self._asleep:
            began = time.perf_counter()
            self._engine.wake()
            self._asleep, self._seconds = 0, self._seconds + time.perf_counter() - began

    @property
    def resting(self) -> RestInfo:
        """What is off the device, and how long that has taken."""
        return RestInfo(0, self._asleep, self._seconds, "" if self._sleeps else STAYS)
