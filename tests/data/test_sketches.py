"""Growing columns, exact length summaries, MinHash."""

from __future__ import annotations

import random
import statistics
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data.sketches import NEAR, SIGNATURE_BYTES, Column, Lengths, near_pairs, repeats, signature


def test_a_column_holds_its_rows_and_little_more() -> None:
    tracemalloc.start()
    column = Column(np.uint64)
    for value in range(40_000):
        column.append(value)
    values = column.take()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(values, np.arange(40_000)) and len(column) == 0 and not len(column.take())
    assert peak < 1.2 * 8 * 40_000
    wide = Column(np.uint8, 3)
    for value in range(100):
        wide.append(np.full(3, value, np.uint8))
    assert wide.take().tolist() == [[value] * 3 for value in range(100)]


@given(st.lists(st.integers(0, 70_000), min_size=1))
def test_summaries_are_exact(lengths: list[int]) -> None:
    counted = Lengths()
    for length in lengths:
        counted.add(length)
    ordered, summary = sorted(lengths), counted.summary()
    assert (summary["count"], summary["min"], summary["max"]) == (len(lengths), ordered[0], ordered[-1])
    assert summary["median"] == statistics.median_low(lengths)
    assert summary["p90"] == ordered[-(-9 * len(lengths) // 10) - 1]
    assert abs(summary["mean"] - statistics.fmean(lengths)) <= 0.051


def test_no_lengths_have_no_summary() -> None:
    assert Lengths().summary() == {"count": 0}


def test_repeats_counts_what_came_before() -> None:
    assert repeats(np.array([5, 1, 5, 5, 2, 1], np.uint64)) == 3 and repeats(np.array([], np.uint64)) == 0


def _pair(rng: random.Random, changed: float, words: int = 200) -> tuple[str, str, float]:
    one = [f"w{rng.randrange(10**6)}" for _ in range(words)]
    two = [f"x{rng.randrange(10**6)}" if rng.random() < changed else word for word in one]
    grams = [{tuple(text[i : i + 3]) for i in range(words - 2)} for text in (one, two)]
    return " ".join(one), " ".join(two), len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_equal_bytes_estimate_the_jaccard_similarity() -> None:
    rng, errors = random.Random(0), []
    for _ in range(150):
        one, two, jaccard = _pair(rng, rng.choice((0.01, 0.05, 0.1, 0.3)))
        a, b = signature(one), signature(two)
        assert a is not None and b is not None
        errors.append(float((a == b).mean()) - jaccard)
    assert abs(np.mean(errors)) < 0.03 and np.std(errors) < 0.11


def test_signatures_of_short_texts() -> None:
    assert signature("") is None
    one, again, other = signature("one"), signature("one"), signature("two")
    assert one is not None and np.array_equal(one, again) and (one == other).sum() < NEAR
    assert len(one) == SIGNATURE_BYTES and not np.array_equal(signature("a b"), signature("b a"))


def _columns(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    found = [signature(text) for text in texts]
    rows = [np.zeros(SIGNATURE_BYTES, np.uint8) if row is None else row for row in found]
    return np.array(rows, np.uint8).reshape(-1, SIGNATURE_BYTES), np.array([hash(text) % 2**64 for text in texts], np.uint64)


def test_near_pairs_are_found_within_and_across_files_and_equal_ones_are_not() -> None:
    rng = random.Random(1)
    near = [_pair(rng, 0.01) for _ in range(60)]
    far = [_pair(rng, 0.5) for _ in range(60)]
    train = [one for one, _, _ in near + far]
    texts = [*train, train[7], "", *(two for _, two, _ in near + far), train[8], ""]
    similar = {len(train) + 2 + n for n, (one, two, jaccard) in enumerate(near) if jaccard >= 0.9 and one != two}
    found = near_pairs(*_columns(texts), [len(train) + 2, len(texts)], across=True)
    assert len(similar & set(found.later.tolist())) >= 0.95 * len(similar) > 30
    partners = dict(zip(found.later.tolist(), found.earlier.tolist(), strict=True))
    assert all(texts[partners[later]] == train[later - len(train) - 2] for later in similar & set(partners))
    assert not [later for later in found.later if later >= len(train) + 2 + 60]
    within = near_pairs(*_columns(texts), [len(train) + 2, len(texts)], across=False)
    assert within.later.tolist() == [len(texts) - 2]  # the copy of train[8], whose near copy stands in the same file
    together = near_pairs(*_columns(texts), [len(texts)], across=False)
    assert set(together.later.tolist()) == {*found.later.tolist(), len(texts) - 2}


def test_one_near_copy_is_found_behind_many_equal_ones() -> None:
    rng = random.Random(2)
    one, two, jaccard = _pair(rng, 0.005)
    texts = [one] * 40_000 + [two] * 50
    assert one != two and jaccard > 0.9
    found = near_pairs(*_columns_repeated(texts), [40_000, len(texts)], across=True)
    assert found.later.tolist() == list(range(40_000, 40_050))


def _columns_repeated(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    distinct = list(dict.fromkeys(texts))
    signatures, hashes = _columns(distinct)
    index = [distinct.index(text) for text in texts]
    return np.ascontiguousarray(signatures[index]), hashes[index]
