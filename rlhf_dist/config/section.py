"""The base of every config section: frozen, typed, unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen pydantic model. A key it does not know is an error, named with its nearest neighbour by `loading`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
