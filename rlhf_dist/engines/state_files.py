"""The files of an engine's checkpoint: safetensors, one file a rank, which any number of ranks at any ZeRO stage can read.

    fragments.json            what was trained: `Index`
    rank_00000.safetensors    weight.NAME, exp_avg.NAME, exp_avg_sq.NAME: fp32, a run of the flattened parameter NAME
                              metadata: fragments = {NAME: [first element of the run, steps that its moments have seen]}
    buffers.safetensors       buffers of the model, where it has any and no weight is frozen

The runs of all files together are every element of every trained parameter, once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.runs.atomic import to_disk

FORMAT = 1
INDEX = "fragments.json"
BUFFERS = "buffers.safetensors"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
CHUNK = 8 * 2**20
ANOTHER = "use another checkpoint"


class Scaler(BaseModel):
    """The state of DeepSpeed's dynamic loss scale (fp16)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    cur_scale: float = Field(gt=0, allow_inf_nan=False)
    cur_iter: int
    last_overflow_iter: int
    cur_hysteresis: int


class Index(BaseModel):
    """What all ranks have in common.

    files: how many ranks wrote one. stage, dtype, world_size: of the engine that saved. parameters: shape by name, of what is trained.
    steps_taken: optimizer steps, also skipped ones. global_steps, skipped_steps: DeepSpeed's own count. scaler: None outside fp16.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    format: int
    world_size: PositiveInt
    files: PositiveInt
    stage: int
    dtype: str
    parameters: dict[str, tuple[NonNegativeInt, ...]]
    steps_taken: NonNegativeInt
    global_steps: NonNegativeInt
    skipped_steps: NonNegativeInt
    scaler: Scaler | None = None


@dataclass(frozen=True)
class Piece:
    """A run of a flattened parameter. start: its first element. step: optimizer steps that its moments have seen. tensors: [n] by kind."""

    name: str
    start: int
    step: float
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Run:
    start: int
    stop: int
    step: float
    file: Any


_Fragments = TypeAdapter(dict[str, tuple[NonNegativeInt, Annotated[float, Field(ge=0, allow_inf_nan=False)]]])


class StateWriter:
    """Runs one save at a time in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[tuple[SavedFile, ...]] | None = None
        self._told = True

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            UserError: the last save failed and nobody was told.
        """
        if self._running is not None and not self._told:
            self.saved(wait=True)

    def begin(self, save: Callable[[], tuple[SavedFile, ...]]) -> None:
        """Starts a save. Call `wait` before copying what it will write: that bounds the memory."""
        self._running, self._told = self._pool.submit(_releasing, save), False

    def saved(self, wait: bool) -> tuple[SavedFile, ...] | None:
        """What the last save wrote; None while it is still writing and the caller does not wait.

        Raises:
            UserError: it failed.
        """
        assert self._running is not None, "no save was begun"
        if not wait and not self._running.done():
            return None
        self._told = True
        return self._running.result()

    def close(self) -> None:
        """Waits for the save that is being written."""
        self._pool.shutdown()


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


@contextmanager
def writing(folder: Path) -> Iterator[list[SavedFile]]:
    """Makes the folder and collects what the block writes into it; makes the folder's own entries durable at the end.

    Raises:
        UserError: the disk is full or cannot be written. What the block wrote is then removed.
    """
    files: list[SavedFile] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield files
        to_disk(folder)
    except OSError as error:
        for file in files:
            (folder / file.name).unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"a file cannot be written ({error.strerror or error})"
        fix = "free space, or keep fewer checkpoints" if full else "mend the file system or its permissions"
        where = str(error.filename or folder)
        raise UserError(f"the checkpoint was not saved: {what}", where=where, fix=f"{fix}; earlier checkpoints are untouched") from error


def write_pieces(path: Path, pieces: Sequence[Piece]) -> SavedFile:
    """Writes a rank's file, hashed on the way and durable. The partial file of a failed write is removed.

    Not by `safetensors.save_file`, which would hold a second copy of everything and read it back for the hash.
    """
    tensors = {f"{kind}.{piece.name}": piece.tensors[kind] for piece in pieces for kind in KINDS}
    fragments = json.dumps({piece.name: [piece.start, piece.step] for piece in pieces})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "fragments": fragments}}
    offset = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.dim() == 1 and tensor.is_contiguous()
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return _write(path, [len(head).to_bytes(8, "little"), head], tensors.values())


def write_index(path: Path, index: Index) -> SavedFile:
    """Writes `Index` as JSON, durable."""
    return _write(path, [index.model_dump_json(indent=2).encode() + b"\n"])


def write_buffers(path: Path, buffers: Mapping[str, Tensor]) -> SavedFile:
    """Writes buffers in their own precision, durable."""
    return _write(path, [save(dict(buffers), metadata={"format": "pt"})])


def settled(path: Path) -> SavedFile:
    """Makes a file durable that somebody else wrote, and hashes it."""
    to_disk(path)
    content = path.read_bytes()
    return SavedFile(path.name, len(content), hashlib.sha256(content).hexdigest())


class SavedState:
    """A checkpoint, open for reading: headers are read and checked at once, numbers when they are asked for (memory-mapped).

    Raises:
        UserError: it is no checkpoint of an engine, is of another format, is damaged or not complete.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.index = _read_index(folder)
        self._runs: dict[str, list[_Run]] = {name: [] for name in self.index.parameters}
        for rank in range(self.index.files):
            self._open(folder / rank_file(rank))
        for name, shape in self.index.parameters.items():
            self._cover(name, math.prod(shape))
        self.buffers = _read_buffers(folder / BUFFERS)

    def step(self, name: str, start: int, stop: int) -> float:
        """Optimizer steps that the moments of these elements of a flattened parameter have seen: the most of them."""
        return max((run.step for run in self._runs[name] if run.start < stop and start < run.stop), default=0.0)

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fills `out` [n] with the elements of a flattened parameter from `start` on, in its own precision and on its own device.

        Args:
            kind: one of `KINDS`.

        Raises:
            UserError: the file is damaged.
        """
        stop = start + out.numel()
        for run in self._runs[name]:
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                with _refusing(self._folder):
                    part = run.file.get_slice(f"{kind}.{name}")[first - run.start : last - run.start]
                out[first - start : last - start].copy_(part)

    def weights(self) -> dict[str, Tensor]:
        """Every trained weight, fp32, and the buffers."""
        whole = {}
        for name, shape in self.index.parameters.items():
            flat = torch.empty(math.prod(shape), dtype=torch.float32)
            self.read("weight", name, 0, flat)
            whole[name] = flat.view(shape)
        return whole | self.buffers

    def _open(self, path: Path) -> None:
        with _refusing(path):
            file = safe_open(path, framework="pt")
            fragments = _Fragments.validate_json((file.metadata() or {}).get("fragments", ""))
            if set(file.keys()) != {f"{kind}.{name}" for kind in KINDS for name in fragments}:
                raise ValueError("it holds other tensors than it says")
            for name, (start, step) in fragments.items():
                slices = [file.get_slice(f"{kind}.{name}") for kind in KINDS]
                shapes = [part.get_shape() for part in slices]
                if name not in self._runs or {part.get_dtype() for part in slices} != {"F32"} or shapes != [[shapes[0][0]]] * len(KINDS):
                    raise ValueError(f"{name} is no run of a trained parameter in fp32")
                self._runs[name].append(_Run(start, start + shapes[0][0], step, file))

    def _cover(self, name: str, numel: int) -> None:
        runs = self._runs[name]
        runs.sort(key=lambda run: run.start)
        bounds = [0, *(run.stop for run in runs)]
        if [run.start for run in runs] != bounds[:-1] or bounds[-1] != numel:
            what = f"the checkpoint is not complete: the fragments of {name} are not its {numel} numbers, each once"
            raise UserError(what, where=str(self._folder), fix=ANOTHER)


def _releasing(save: Callable[[], tuple[SavedFile, ...]]) -> tuple[SavedFile, ...]:
    """Runs a save. Where it fails, the frames of its error must not keep the copy that it held beside the next one."""
    try:
        return save()
    except Exception as error:
        del save
        for each in (error, error.__cause__):
            traceback.clear_frames(each.__traceback__ if each else None)
        raise


def _read_index(folder: Path) -> Index:
    path = folder / INDEX
    if not path.is_file():
        raise UserError("the folder holds no engine checkpoint", where=str(folder), fix="name a folder that an engine saved")
    with _refusing(path):
        text = path.read_bytes()
        found = TypeAdapter(dict[str, Any]).validate_json(text).get("format")
        if found != FORMAT:
            fix = "load it with the release that saved it"
            raise UserError(f"the checkpoint has format {found!r}, this release reads {FORMAT}", where=str(path), fix=fix)
        return Index.model_validate_json(text)


def _read_buffers(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    with _refusing(path):
        return load_file(path)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What a damaged file makes its readers raise, as one error that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError("a file of the checkpoint is missing", where=str(path), fix=ANOTHER) from error
    except (OSError, SafetensorError, ValidationError, ValueError, IndexError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"a file of the checkpoint is damaged: {what}", where=str(path), fix=ANOTHER) from error


def _write(path: Path, heads: Iterable[bytes], tensors: Iterable[Tensor] = ()) -> SavedFile:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for block in [*(memoryview(head) for head in heads), *(tensor.numpy().data.cast("B") for tensor in tensors)]:
                for first in range(0, len(block), CHUNK):
                    chunk = block[first : first + CHUNK]
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise
    return SavedFile(path.name, size, digest.hexdigest())
