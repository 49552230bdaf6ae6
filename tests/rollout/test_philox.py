"""Philox against Random123's published vectors, and the uniforms drawn from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.rollout.philox import philox4x32, stream_key, uniforms

# Random123, kat_vectors: counter, key (low word first), result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = words(key)
    result = philox4x32(tuple(torch.tensor([word]) for word in words(counter)), low | high << 32)
    assert [int(word) for word in result] == words(expected)


def test_the_key_is_a_stable_hash_of_all_three_parts() -> None:
    assert stream_key(0, "train", 0) == 15417496214868192855  # b2sum -l 64 of "0/train/0", read as little-endian
    keys = {stream_key(seed, stream, step) for seed in (0, 1) for stream in ("train", "eval") for step in (0, 1, 10)}
    assert len(keys) == 12


@settings(max_examples=40, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1),
    ids=st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31)), min_size=1, max_size=6),
    width=st.integers(1, 9),
)
def test_a_row_does_not_depend_on_its_company_or_on_the_width(key: int, ids: list[tuple[int, int]], width: int) -> None:
    prompts, samples = zip(*ids, strict=True)
    together = uniforms(key, prompts, samples, width)
    assert together.dtype == torch.float32 and together.shape == (len(ids), width)
    assert bool((together > 0).all()) and bool((together < 1).all())
    for i, (prompt, sample) in enumerate(ids):
        assert torch.equal(together[i], uniforms(key, [prompt], [sample], width + 3)[0, :width])


def test_every_part_of_the_counter_matters() -> None:
    base = uniforms(1, [5], [0], 8)
    for other in (uniforms(2, [5], [0], 8), uniforms(1, [6], [0], 8), uniforms(1, [5 + 2**32], [0], 8), uniforms(1, [5], [1], 8)):
        assert not torch.isclose(base, other, atol=1e-4).any()
    assert len(set(base[0].tolist())) == 8


def test_signed_and_unsigned_ids_are_the_same_number() -> None:
    assert torch.equal(uniforms(1, [-1], [0], 4), uniforms(1, [2**64 - 1], [0], 4))


def test_uniform_in_mean_variance_and_buckets() -> None:
    values = uniforms(stream_key(3, "train", 7), range(200), [0] * 200, 500).flatten()
    assert values.mean().item() == pytest.approx(0.5, abs=0.004)
    assert values.var().item() == pytest.approx(1 / 12, abs=0.001)
    counts = torch.histc(values, 20, 0, 1)
    chi_square = ((counts - 5000) ** 2 / 5000).sum().item()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001


def test_no_rows() -> None:
    assert uniforms(0, [], [], 4).shape == (0, 4)
