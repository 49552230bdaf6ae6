"""Sections are frozen, refuse unknown keys and check their own defaults."""

import pytest
from pydantic import Field, ValidationError

from rlhf_dist.config.section import Section


class Example(Section):
    """A section with one bounded number."""

    size: int = Field(1, ge=1)


def test_a_section_cannot_be_changed_after_validation():
    with pytest.raises(ValidationError, match="frozen"):
        Example().size = 2  # type: ignore[misc]


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError) as caught:
        Example.model_validate({"sise": 2})
    assert [error["type"] for error in caught.value.errors()] == ["extra_forbidden"]


def test_defaults_are_validated_too():
    class Wrong(Section):
        size: int = Field(0, ge=1)

    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Wrong()
