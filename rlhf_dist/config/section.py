"""The base of every config section: frozen, typed, unknown keys refused."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen pydantic model. A key it does not know is an error, named with its nearest neighbour by `loading`.

    Numbers are finite, whole ones fit into 64 bits; and true and false, which pydantic would take for 1 and 0, are no numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_numbers(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{name} is too large a number")
            kinds = _kinds(cls.model_fields[name].annotation) if isinstance(value, bool) and name in cls.model_fields else {bool}
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(f"{name} is {str(value).lower()}, and should be a number")
        return values


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows."""
    if get_origin(annotation) in (Union, UnionType):
        return {kind for each in get_args(annotation) for kind in _kinds(each)}
    return _kinds(get_args(annotation)[0]) if get_origin(annotation) is Annotated else {annotation}
