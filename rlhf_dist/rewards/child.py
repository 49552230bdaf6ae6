"""The process in which a user's function runs: it loads the function, then answers one request after another until its parent is gone.

Requests come as pickles from the parent, which made them; answers go back as JSON, so the parent never unpickles what user code had a hand
in. Frames are a length of eight bytes and as many bytes of content. Standard output and error are the parent's.

The process leads a group of its own and ends with its parent, however that ends: the parent holds the writing end of a pipe, and the kernel
kills the whole group when that end closes (F_SETSIG). No thread and no Python code is needed for it, so a function that never lets go of
the interpreter, or the processes that it started, end as well.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pickle
import select
import signal
import socket
import struct
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.reward import Attempt
from rlhf_dist.rewards.function import UserFunction

LENGTH = struct.Struct("!Q")
F_SETSIG = 10
"""Linux's fcntl command; the module `fcntl` has no name for it before Python 3.11."""


def main(name: str, path: str, connection: int, lifeline: int) -> None:
    """Runs until the parent closes the connection.

    Args:
        name, path: of the function. connection: descriptor of a stream socket.
        lifeline: descriptor of a pipe that the parent never writes to.
    """
    end_with_parent(lifeline)
    with socket.socket(fileno=connection) as parent:
        try:
            function = UserFunction(name, path)
        except UserError as error:
            _send(parent, _refusal(error))
            return
        _send(parent, {"ready": True})
        while (request := _receive(parent)) is not None:
            try:
                answer = _written(function.attempt(pickle.loads(request)))
            except UserError as error:
                answer = _refusal(error)
            _send(parent, answer)


def end_with_parent(lifeline: int) -> None:
    """Has the kernel kill this process group when the other end of the pipe closes."""
    os.set_inheritable(lifeline, False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):  # it closed before the kernel was told
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _written(attempt: Attempt) -> dict[str, Any]:
    """Failures of a call are the same for all its rows: once is enough."""
    kinds = list(dict.fromkeys(attempt.failures.values()))
    rows = [[row, kinds.index(failure)] for row, failure in attempt.failures.items()]
    return {"values": attempt.values, "failures": [dataclasses.asdict(kind) for kind in kinds], "rows": rows}


def _refusal(error: UserError) -> dict[str, Any]:
    return {"refused": {"what": error.what, "where": error.where, "fix": error.fix}}


def _send(parent: socket.socket, answer: dict[str, Any]) -> None:
    content = json.dumps(answer).encode()
    parent.sendall(LENGTH.pack(len(content)) + content)


def _receive(parent: socket.socket) -> bytes | None:
    """The next request; None when the parent has closed the connection."""
    head = _exactly(parent, LENGTH.size)
    return None if head is None else _exactly(parent, LENGTH.unpack(head)[0])


def _exactly(parent: socket.socket, count: int) -> bytes | None:
    content = bytearray()
    while len(content) < count:
        part = parent.recv(min(count - len(content), 1 << 20))
        if not part:
            return None
        content += part
    return bytes(content)
