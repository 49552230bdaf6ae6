"""A checkpoint's files: any cut reads back exactly, what is damaged is named, what cannot be written leaves nothing behind."""

import hashlib
import itertools
import json
import math
import random
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlhf_dist.config.errors import UserError
from rlhf_dist.engines.state_files import (
    BUFFERS,
    FORMAT,
    INDEX,
    KINDS,
    Index,
    Piece,
    SavedState,
    Scaler,
    StateWriter,
    rank_file,
    settled,
    write_buffers,
    write_index,
    write_pieces,
    writing,
)

SHAPES = {"a.weight": (3, 5), "a.bias": (7,), "empty": (0, 4)}
SCALER = Scaler(cur_scale=2.0**16, cur_iter=3, last_overflow_iter=-1, cur_hysteresis=2)


def index_of(files: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Index:
    counts = {"steps_taken": 3, "global_steps": 3, "skipped_steps": 1}
    return Index(format=FORMAT, world_size=files, files=files, stage=2, dtype="fp32", parameters=shapes, scaler=SCALER, **counts)


def numbers(name: str, kind: str) -> torch.Tensor:
    """Of a whole flattened parameter; -0.0 is among them."""
    flat = torch.randn(math.prod(SHAPES[name]), generator=torch.Generator().manual_seed(KINDS.index(kind) + 7 * len(name)))
    flat[::4] = -0.0
    return flat


def piece(name: str, start: int, stop: int, step: float = 2.0) -> Piece:
    return Piece(name, start, step, {kind: numbers(name, kind)[start:stop].clone() for kind in KINDS})


def checkpoint(folder: Path, cuts: dict[str, list[int]] | None = None, files: int = 2) -> Path:
    """Parameters cut at `cuts`, the runs dealt to the files in turn."""
    cuts = cuts or {"a.weight": [4], "a.bias": []}
    parts: list[list[Piece]] = [[] for _ in range(files)]
    for name, inner in cuts.items():
        bounds = [0, *sorted(set(inner)), math.prod(SHAPES[name])]
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            parts[number % files].append(piece(name, start, stop, step=2.0 + number))
    with writing(folder) as saved:
        saved += [write_pieces(folder / rank_file(rank), held) for rank, held in enumerate(parts)]
        saved += [write_index(folder / INDEX, index_of(files)), write_buffers(folder / BUFFERS, {"scale": torch.tensor([2, 3])})]
    return folder


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_range_of_any_cut_reads_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    cuts = {"a.weight": data.draw(st.lists(st.integers(1, 14), max_size=2)), "a.bias": data.draw(st.lists(st.integers(1, 6), max_size=2))}
    saved = SavedState(checkpoint(tmp_path_factory.mktemp("cut"), cuts, files=3))
    name, kind = data.draw(st.sampled_from(sorted(cuts))), data.draw(st.sampled_from(KINDS))
    start, stop = sorted(data.draw(st.lists(st.integers(0, math.prod(SHAPES[name])), min_size=2, max_size=2)))
    out = torch.full((stop - start,), math.nan)
    saved.read(kind, name, start, out)
    assert torch.equal(out.view(torch.int32), numbers(name, kind)[start:stop].view(torch.int32)), "-0.0 is not 0.0"
    if start < stop:
        assert saved.step(name, start, stop) == 2.0 + sum(cut < stop for cut in set(cuts[name])), "the step of the last run that it touches"


def test_a_checkpoint_is_plain_safetensors_with_true_hashes(tmp_path: Path) -> None:
    with writing(tmp_path / "new" / "folder") as files:
        path = tmp_path / "new" / "folder" / rank_file(0)
        files.append(write_pieces(path, [piece("a.weight", 3, 9)]))
        (path.parent / "config.json").write_text("{}")
        files.append(settled(path.parent / "config.json"))
    for file in files:
        content = (path.parent / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    held = load_file(path)
    assert sorted(held) == sorted(f"{kind}.a.weight" for kind in KINDS)
    assert all(torch.equal(held[f"{kind}.a.weight"], numbers("a.weight", kind)[3:9]) for kind in KINDS)


def test_whole_weights_buffers_and_counts_come_back(tmp_path: Path) -> None:
    saved = SavedState(checkpoint(tmp_path))
    weights = saved.weights()
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == SHAPES | {"scale": (2,)}
    assert torch.equal(weights["a.weight"].flatten(), numbers("a.weight", "weight")) and weights["scale"].tolist() == [2, 3]
    assert saved.index == index_of(2) and saved.index.scaler == SCALER


# --- what is refused --------------------------------------------------------------------------------------------------------------------


def changed(folder: Path, **values: object) -> Path:
    path = folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_no_whole_checkpoint_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    def refused(folder: Path, what: str, where: str) -> None:
        with pytest.raises(UserError, match=what) as caught:
            SavedState(folder)
        assert caught.value.where.endswith(where) and caught.value.fix

    refused(tmp_path / "nothing", "no engine checkpoint", "nothing")
    refused(changed(checkpoint(tmp_path / "a"), format=2), "format 2, this release reads 1", INDEX)
    refused(changed(checkpoint(tmp_path / "b"), files=3), "missing", rank_file(2))
    refused(changed(checkpoint(tmp_path / "c"), files=1), "not complete: the fragments of a.weight", "c")
    refused(changed(checkpoint(tmp_path / "d"), parameters={"a.weight": [3, 5]}), "a.bias is no run", rank_file(0))
    refused(changed(checkpoint(tmp_path / "e"), parameters=SHAPES | {"b": (2,)}), "the fragments of b", "e")
    twice = checkpoint(tmp_path / "f")
    write_pieces(twice / rank_file(1), [piece("a.weight", 4, 15), piece("a.bias", 2, 4)])
    refused(twice, "the fragments of a.bias are not its 7 numbers, each once", "f")
    for name in (INDEX, rank_file(1), BUFFERS):
        short = checkpoint(tmp_path / f"short_{name}")
        (short / name).write_bytes((short / name).read_bytes()[:-9])
        refused(short, "damaged", name)
        (short / name).write_bytes(b"")
        refused(short, "damaged", name)


def test_mutated_files_are_refused_or_read_and_never_a_traceback(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    rng, refused = random.Random(0), 0
    for _ in range(400):
        path = folder / rng.choice([INDEX, rank_file(0), BUFFERS])
        whole = path.read_bytes()
        mutated = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(mutated))
            match rng.randrange(3):
                case 0:
                    mutated[place] = rng.randrange(256)
                case 1:
                    del mutated[place : place + rng.randint(1, 20)]
                case _:
                    mutated[place:place] = rng.choice([b"9", b"-", b'"', b"{", b"[", b"\xff", b"1e999", b"null"])
        path.write_bytes(bytes(mutated))
        try:
            saved = SavedState(folder)
            assert saved.index.parameters.keys() == saved.weights().keys() - saved.buffers.keys()
        except UserError:
            refused += 1
        path.write_bytes(whole)
    assert 130 < refused < 400


def test_tensors_that_the_file_does_not_account_for_are_not_left_out(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    with safe_open(folder / rank_file(0), framework="pt") as file:
        metadata = file.metadata()
    held = load_file(folder / rank_file(0))
    save_file(held | {"weight.more": torch.zeros(2)}, folder / rank_file(0), metadata)
    with pytest.raises(UserError, match="other tensors than it says"):
        SavedState(folder)


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    """/dev/full takes no byte."""
    with pytest.raises(UserError, match="the disk is full") as caught, writing(tmp_path) as files:
        files.append(write_index(tmp_path / INDEX, index_of(1)))
        (tmp_path / rank_file(0)).symlink_to("/dev/full")
        files.append(write_pieces(tmp_path / rank_file(0), [piece("a.bias", 0, 7)]))
    assert list(tmp_path.iterdir()) == []
    assert caught.value.where == str(tmp_path / rank_file(0)) and "free space" in caught.value.fix
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written") as caught, writing(tmp_path / "file" / "folder"):
        pass
    assert "file" in caught.value.where


# --- the thread -------------------------------------------------------------------------------------------------------------------------


def test_one_save_at_a_time_and_its_files_when_it_is_done() -> None:
    writer, go = StateWriter(), threading.Event()
    writer.wait()
    writer.begin(lambda: (go.wait(10), ())[1])
    assert writer.saved(wait=False) is None
    threading.Timer(0.05, go.set).start()
    writer.wait()
    assert go.is_set() and writer.saved(wait=False) == () == writer.saved(wait=True)
    writer.close()


def test_a_failed_save_is_told_once_to_whoever_asks_first() -> None:
    def fail(copy: torch.Tensor | None = None) -> tuple[()]:
        raise UserError("the disk is full") from OSError(28, str(copy is None))

    writer, copy = StateWriter(), torch.zeros(9)
    left = weakref.ref(copy)
    writer.begin(partial(fail, copy))
    del copy
    with pytest.raises(UserError, match="full"):
        writer.wait()
    assert left() is None, "the copy that could not be written is free before the next is made"
    writer.wait()
    writer.begin(fail)
    with pytest.raises(UserError, match="full"):
        writer.saved(wait=True)
    writer.wait()
    writer.begin(lambda: ())
    assert writer.saved(wait=True) == ()
    with pytest.raises(AssertionError, match="no save"):
        StateWriter().saved(wait=False)
