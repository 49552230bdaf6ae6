"""What travels between coordinator and workers, as bytes: handles become numbered places, payloads travel apart."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_dist.contracts.group import Stored


def pack(value: Any, reference_of: Callable[[Any], Any | None]) -> tuple[bytes, list[Any]]:
    """Pickles a value with its handles taken out.

    Args:
        value: arguments; handles may stand anywhere inside.
        reference_of: gives a handle's reference, None for anything else.

    Returns:
        The bytes, and the references in the order of their places.
    """
    references: list[Any] = []

    class Packer(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            reference = reference_of(obj)
            if reference is None:
                return None
            references.append(reference)
            return len(references) - 1

    buffer = io.BytesIO()
    Packer(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue(), references


def unpack(data: bytes, payloads: Sequence[Any]) -> Any:
    """The value again, with payloads in the places of their handles."""

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return payloads[pid]

    return Unpacker(io.BytesIO(data)).load()


def split(answer: Any) -> tuple[Any, bytes]:
    """A method's answer as the payload that stays, and the record that travels, pickled so that its size is known."""
    if isinstance(answer, Stored):
        return answer.payload, pickle.dumps(answer.info, protocol=pickle.HIGHEST_PROTOCOL)
    return None, pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
