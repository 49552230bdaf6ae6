"""A storage that left its device comes back with the same bits, and everything that looks into it is still the same object."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf_dist.engines.offload import SMALLEST, Parking, own_weights, training_storages, weight_storages

CPU = torch.device("cpu")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_parked_storage_is_empty_and_comes_back_bit_for_bit(dtype) -> None:
    flat = torch.randint(-1000, 1000, (5000,), generator=torch.Generator().manual_seed(0)).to(dtype)
    view, before, parking, files = flat[1000:3000].view(40, 50), flat.clone(), Parking(CPU), open_files()
    parking.park([view.untyped_storage()])
    assert flat.untyped_storage().nbytes() == 0 and parking.bytes == before.nbytes
    parking.restore()
    assert torch.equal(flat, before) and torch.equal(view.flatten(), before[1000:3000]) and parking.bytes == 0
    view[0, 0] += 1
    assert flat[1000] == before[1000] + 1, "the view still looks into the same memory"
    assert open_files() == files


def test_nothing_parked_is_nothing_to_restore_and_small_things_stay() -> None:
    parking, step = Parking(CPU), torch.ones(SMALLEST // 4 - 1)
    parking.park([step.untyped_storage()])
    parking.restore()
    assert parking.bytes == 0 and bool((step == 1).all())


def mapped_bytes(folder: Path) -> torch.Tensor:
    """8000 bytes of a file, as safetensors are mapped."""
    (folder / "file").write_bytes(bytes(range(250)) * 32)
    return torch.from_file(str(folder / "file"), size=8000, dtype=torch.uint8)


def test_its_clock_runs_while_it_works_and_not_otherwise() -> None:
    tensor, parking = torch.ones(50_000), Parking(CPU)
    parking.restore()
    assert parking.seconds == 0.0
    parking.park([tensor.untyped_storage()])
    parked = parking.seconds
    parking.restore()
    assert parking.seconds > parked > 0


def test_a_file_that_was_cut_short_is_noticed() -> None:
    tensor, parking = torch.ones(50_000), Parking(CPU)
    parking.park([tensor.untyped_storage()])
    parking._file.truncate(1000)
    with pytest.raises(OSError, match="cut short"):
        parking.restore()


def test_mapped_weights_get_memory_of_their_own_and_stay_what_they_were(tmp_path) -> None:
    """Views into one map still look into one memory; what can be emptied as it is stays."""
    mapped, plain = mapped_bytes(tmp_path), torch.ones(2000)
    before, module = mapped.clone(), nn.Module()
    module.register_buffer("even", mapped[::2])
    module.register_buffer("late", mapped[6000:].view(20, 100))
    module.register_buffer("plain", plain)
    own_weights(module)
    assert torch.equal(module.even, before[::2]) and torch.equal(module.late, before[6000:].view(20, 100))
    module.late[0, 0] += 1
    assert module.even[3000] == before[6000] + 1 and mapped[6000] == before[6000]
    assert module.plain.data_ptr() == plain.data_ptr() and module.even.stride() == (2,)
    assert all(storage.resizable() for storage in weight_storages(module).values())


def test_memory_that_cannot_be_emptied_stays(tmp_path) -> None:
    mapped = mapped_bytes(tmp_path)
    parking = Parking(CPU)
    parking.park([mapped.untyped_storage()])
    assert parking.bytes == 0 and mapped.untyped_storage().nbytes() == 8000


def test_training_state_is_everything_but_the_weights() -> None:
    module = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(64)).sum().backward()
    optimizer.step()
    weights, training = weight_storages(module), training_storages(optimizer, module)
    assert not set(weights) & set(training)
    sizes = {key: storage.nbytes() for key, storage in training.items()}
    wanted = [module.weight.grad, *(optimizer.state[module.weight][name] for name in ("exp_avg", "exp_avg_sq"))]
    assert all(sizes[tensor.untyped_storage()._cdata] == 64 * 64 * 4 for tensor in wanted)
    assert module.weight.untyped_storage()._cdata in weights and module.bias.untyped_storage()._cdata in weights


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_its_memory_back() -> None:
    gc.collect()
    held = torch.randn(64 * 2**20, device="cuda")
    before, copied, parking = torch.cuda.memory_allocated(), held.cpu(), Parking(held.device)
    for _ in range(2):
        parking.park([held.untyped_storage()])
        assert torch.cuda.memory_allocated() <= before - held.numel() * 4
        parking.restore()
        assert torch.equal(held.cpu(), copied)
