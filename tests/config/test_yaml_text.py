"""YAML gives plain values or one error, whatever stands in it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.yaml_text import DEEPEST, read_yaml

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\r\t")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc<=", max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(VALUES)
def test_plain_values_come_back(values: Any) -> None:
    assert read_yaml(yaml.safe_dump(values, allow_unicode=True)) == values


def test_anchors_and_merged_keys_may_be_used() -> None:
    assert read_yaml("a: &x {lr: 1, steps: 2}\nb: {<<: *x, lr: 3}\nc: *x") == {
        "a": {"lr": 1, "steps": 2},
        "b": {"lr": 3, "steps": 2},
        "c": {"lr": 1, "steps": 2},
    }
    assert read_yaml("") is None and read_yaml("# nothing") is None


BAD = {
    "a key twice": ("run: {steps: 1, seed: 0, steps: 2}", "'steps' comes twice \\(line 1\\)"),
    "a section twice": ("run: {steps: 1}\ndata: {}\nrun: {steps: 2}", "'run' comes twice \\(line 3\\)"),
    "an object": ("a: !!python/object/apply:os.system ['true']", "no plain value"),
    "a tag of one's own": ("a: !x 1", "no plain value"),
    "a set, which has no order": ("a: !!set {x, y}", "no plain value"),
    "a key that is a list": ("? [a]\n: b", "no text"),
    "a node in itself": ("&a [*a]", "levels deep"),
    "deep": ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "levels deep"),
    "bottomless": ("[" * 2_000, "levels deep"),
    "no day": ("a: 2020-13-45", "month"),
    "thousands of digits": ("a: " + "9" * 5000, "digit"),
    "no number": ("a: !!int x", "invalid literal"),
    "no switch": ("a: !!bool x", "cannot be read"),
    "no time": ("a: !!timestamp x", "cannot be read"),
    "a NUL": ('a: "\\0"', "control character"),
    "a next line": ('a: "\\x85"', "control character"),
    "half a surrogate pair": ('a: "\\ud83d"', "surrogate"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "a tab": ("a:\n\t- 1", "cannot start any token"),
}


@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_one_kind_of_error(case: str) -> None:
    text, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        read_yaml(text)


def test_a_billion_laughs_take_no_time() -> None:
    lines = ["a0: &a0 [ha, ha]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    began = time.process_time()
    with pytest.raises(ValueError, match="unfolds to more than"):
        read_yaml("\n".join(lines))
    assert time.process_time() - began < 1


@given(st.text() | st.text("&*a[]{}:,?!-|>'\"%@` \n\t<0"))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        read_yaml(text)
    except ValueError as error:
        assert str(error)
