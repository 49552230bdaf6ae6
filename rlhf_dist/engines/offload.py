"""What an engine does not need for now leaves its device: from a GPU to pinned host memory, on a CPU to a file.

It is the tensors' storages that are emptied. Parameters, views into DeepSpeed's flat buffers and optimiser state stay the objects they
are, at every ZeRO stage, and hold the same bits once their storage is filled again.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError

SMALLEST = 1024
"""Bytes; step counters and the like stay where they are."""
FOLLOWED = "deepspeed.runtime"
"""Objects of DeepSpeed's own are looked into; what else its optimiser refers to is not its state."""

Storages = dict[int, torch.UntypedStorage]


class Parking:
    """A place for the storages of one device. Restore before anything touches them.

    Args:
        device: where the storages live.

    Attributes:
        seconds: spent in `park` and `restore` so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parked: list[tuple[torch.UntypedStorage, int]] = []
        self._kept = 0
        self._host: list[Tensor] = []
        self._file: Any = None
        self.seconds = 0.0

    @property
    def bytes(self) -> int:
        """What lies here now."""
        return sum(size for _, size in self._parked)

    def park(self, storages: Iterable[torch.UntypedStorage], scratch: Iterable[torch.UntypedStorage] = ()) -> None:
        """Takes the bytes of storages and empties them. Those that cannot be emptied (memory maps, shared memory) stay as they are.

        Args:
            storages: come back with their bytes. scratch: come back with any.

        Raises:
            UserError: the folder of temporary files is full.
        """
        assert not self._parked, "restore what lies here first"
        began = time.perf_counter()
        kept, lost = ([storage for storage in part if self._takes(storage)] for part in (storages, scratch))
        self._parked, self._kept = [(storage, storage.nbytes()) for storage in kept + lost], len(kept)
        if self._device.type == "cuda":
            self._to_host(kept)
        else:
            self._to_file(kept)
        for storage in kept + lost:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            _trim()
        self.seconds += time.perf_counter() - began

    def restore(self) -> None:
        """Fills the storages again; without any parked it does nothing."""
        if not self._parked:
            return
        began = time.perf_counter()
        for number, (storage, size) in enumerate(self._parked):
            storage.resize_(size)
            if number < self._kept:
                self._fetch(number, storage)
        if self._file is not None:
            self._file.close()
            self._file = None
        else:
            torch.cuda.synchronize(self._device)
        self._parked = []
        self.seconds += time.perf_counter() - began

    def _to_host(self, storages: list[torch.UntypedStorage]) -> None:
        sizes = [storage.nbytes() for storage in storages]
        if [len(buffer) for buffer in self._host] != sizes:  # pinning is slow: the buffers are kept from phase to phase
            self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        for buffer, storage in zip(self._host, storages, strict=True):
            buffer.copy_(_as_bytes(storage), non_blocking=True)
        torch.cuda.synchronize(self._device)

    def _to_file(self, storages: list[torch.UntypedStorage]) -> None:
        """One storage after the other, each emptied before the next: at no time is much in memory twice."""
        self._file = tempfile.TemporaryFile(prefix="rlhf_dist_offload_", buffering=0)  # noqa: SIM115 (until it is restored)
        try:
            for storage in storages:
                self._write(_memory(storage))
                storage.resize_(0)
        except OSError as error:
            gib = sum(size for _, size in self._parked) / 2**30
            raise UserError(
                f"an idle engine of {gib:.1f} GiB does not fit into {tempfile.gettempdir()}: {error.strerror}",
                where="placement.offload: idle",
                fix="point TMPDIR to a folder with more room, or set placement.offload=none",
            ) from error
        self._file.seek(0)

    def _write(self, memory: Any) -> None:
        """All of it: one call of the system writes 2 GiB at most."""
        written = 0
        while written < len(memory):
            written += self._file.write(memory[written:])

    def _takes(self, storage: torch.UntypedStorage) -> bool:
        """What DeepSpeed itself keeps in host memory is not on the device; what is mapped or shared cannot be emptied."""
        return storage.device.type == self._device.type and storage.nbytes() >= SMALLEST and storage.resizable()

    def _fetch(self, number: int, storage: torch.UntypedStorage) -> None:
        """Storages come back in the order in which they left."""
        if self._file is None:
            _as_bytes(storage).copy_(self._host[number], non_blocking=True)
        elif self._file.readinto(_memory(storage)) != storage.nbytes():
            raise OSError("the temporary file of an idle engine was cut short")


def own_weights(module: nn.Module) -> None:
    """Gives weights and buffers that cannot be emptied memory of their own: a folder in the model's precision is mapped on a CPU, not read.

    Before anyone else looks into their storages.
    """
    copies: dict[int, torch.UntypedStorage] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and not storage.resizable():
            copy = copies.setdefault(storage._cdata, storage.clone())
            place = tensor.storage_offset(), tensor.size(), tensor.stride()
            tensor.data = tensor.data.new_empty(0).set_(copy, *place)


def weight_storages(module: nn.Module) -> Storages:
    """Storages of a module's weights and buffers; of a module that ZeRO 3 has sharded, of its shards."""
    tensors = [*module.parameters(), *module.buffers()]
    shards = [parameter.ds_tensor for parameter in module.parameters() if hasattr(parameter, "ds_tensor")]
    return _storages(tensors + shards)


def training_storages(optimizer: Any, module: nn.Module) -> Storages:
    """Storages that only training needs: optimiser state, master weights, gradients; neither the module's weights nor scratch.

    Args:
        optimizer: DeepSpeed's, or torch's where DeepSpeed wraps none.
        module: the trained module.
    """
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    held = _storages([*gradients, *_tensors(optimizer, set())])
    for key in [*weight_storages(module), *scratch_storages(optimizer)]:
        held.pop(key, None)
    return held


def scratch_storages(optimizer: Any) -> Storages:
    """DeepSpeed's buckets, which mean nothing between steps: by default 500 million elements each."""
    buckets = getattr(optimizer, "ipg_buckets", {}).values()
    return _storages(tensor for bucket in buckets for tensor in _tensors(bucket.buffer, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that a value reaches through containers, torch optimisers and DeepSpeed's own objects."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner, seen)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _tensors(inner, seen)
    elif isinstance(value, torch.optim.Optimizer) or type(value).__module__.startswith(FOLLOWED):
        yield from _tensors(getattr(value, "__dict__", {}), seen)


def _storages(tensors: Iterable[Tensor]) -> Storages:
    found = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    return {storage._cdata: storage for storage in found}


def _memory(storage: torch.UntypedStorage) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a storage on a CPU. Not by way of numpy: it makes a storage unresizable for good."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload, no-any-return]


def _trim() -> None:
    """Gives freed pages back to the kernel, which `engines.memory` otherwise keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
