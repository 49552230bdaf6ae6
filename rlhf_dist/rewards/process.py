"""A function's own process, seen from the parent: started, asked with a hard time limit, killed when it does not answer, started anew."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from rlhf_dist.contracts.reward import RewardRequest
from rlhf_dist.rewards.child import LENGTH

LOOK_S = 0.2
"""While an answer is awaited, how often the process is looked at: a child of its own may hold the connection open after its death."""
LONGEST_ANSWER = 1 << 30

BOOT = """
import sys
name, path, connection, lifeline, *sys.path[:] = sys.argv[1:]
sys.argv[:] = [path]
from rlhf_dist.rewards.child import main
main(name, path, int(connection), int(lifeline))
"""


class ProcessEnded(Exception):
    """The process died, or stopped talking; the message says how."""


class TookTooLong(Exception):
    """No answer came within the time limit; the process is dead by now."""


class FunctionProcess:
    """One child process at a time, from the same working directory and search path.

    Args:
        name, path: of the function that it loads (`rewards.child`).
    """

    def __init__(self, name: str, path: str) -> None:
        self._given = (name, path)
        self._folder, self._search_path = Path.cwd(), list(sys.path)
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._end: weakref.finalize[[int, subprocess.Popen[bytes], socket.socket, int], FunctionProcess] | None = None

    @property
    def alive(self) -> bool:
        """Whether there is a process to ask."""
        return self._child is not None and not _has_ended(self._child)

    @property
    def pid(self) -> int | None:
        """Of the process; it leads a process group."""
        return None if self._child is None else self._child.pid

    def start(self, limit_s: float) -> dict[str, Any]:
        """Starts a process and waits for its first answer: ready, or why it cannot be.

        Raises:
            ProcessEnded, TookTooLong: no answer came.
        """
        self.kill()
        ours, theirs = socket.socketpair()
        watched, lifeline = os.pipe()
        arguments = [*self._given, str(theirs.fileno()), str(watched), *self._search_path]
        try:
            child = subprocess.Popen(
                [sys.executable, "-u", "-c", BOOT, *arguments],
                cwd=self._folder,
                pass_fds=(theirs.fileno(), watched),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            os.close(lifeline)
            raise
        finally:
            theirs.close()
            os.close(watched)
        self._child, self._connection = child, ours
        self._end = weakref.finalize(self, _ended, os.getpid(), child, ours, lifeline)
        return self._answer(time.monotonic() + limit_s)

    def ask(self, request: RewardRequest, limit_s: float) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            ProcessEnded, TookTooLong: no answer came. The process is dead then; `start` makes another.
        """
        content = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        assert self._connection is not None  # `start` came before
        deadline = time.monotonic() + limit_s
        try:
            self._send(LENGTH.pack(len(content)) + content, limit_s)
            return self._answer(deadline)
        except BaseException:  # an interrupt, say: the answer to this request must not be taken for that to the next
            self.kill()
            raise

    def kill(self) -> None:
        """Kills the whole process group, if there is one."""
        if self._end is not None:
            self._end()
        self._child = self._connection = self._end = None

    def _send(self, content: bytes, limit_s: float) -> None:
        assert self._connection is not None
        try:
            self._connection.settimeout(limit_s)
            self._connection.sendall(content)
        except TimeoutError:
            raise self._too_late() from None
        except OSError:
            raise self._gone() from None

    def _answer(self, deadline: float) -> dict[str, Any]:
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size, deadline))
        if length > LONGEST_ANSWER:
            raise self._gone()
        try:
            answer: dict[str, Any] = json.loads(self._exactly(length, deadline))
        except ValueError:
            raise self._gone() from None
        return answer

    def _exactly(self, count: int, deadline: float) -> bytes:
        assert self._connection is not None
        content = bytearray()
        while len(content) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._too_late()
            self._connection.settimeout(min(left, LOOK_S))
            dead = not self.alive  # looked at before reading: what it wrote last is read all the same
            try:
                part = self._connection.recv(min(count - len(content), 1 << 20))
            except TimeoutError:
                if dead:
                    raise self._gone() from None
                continue
            except OSError:
                raise self._gone() from None
            if not part:
                raise self._gone()
            content += part
        return bytes(content)

    def _too_late(self) -> TookTooLong:
        self.kill()
        return TookTooLong()

    def _gone(self) -> ProcessEnded:
        """How it ended; one that lives and does not talk sensibly any more is killed."""
        child, deadline = self._child, time.monotonic() + LOOK_S
        assert child is not None
        while (by_itself := _has_ended(child)) is False and time.monotonic() < deadline:
            time.sleep(0.001)
        self.kill()
        return ProcessEnded(_how_it_ended(child.returncode) if by_itself else "closed or misused its connection to the run")


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Without reaping it: as long as its process number is taken, `killpg` can hit no stranger."""
    if child.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # someone in this process waits for all children, and got it first
        return True


def _ended(owner: int, child: subprocess.Popen[bytes], connection: socket.socket, lifeline: int) -> None:
    """Kills the group, of which processes that the function started may be left when its leader is dead."""
    if os.getpid() != owner:  # a fork of the owner ends: the process is not its own
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # the leader is not reaped yet, so the group exists
    child.wait()
    connection.close()
    os.close(lifeline)


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "a real-time signal"
    hint = "; the system does that when memory runs out" if -status == signal.SIGKILL else ""
    return f"was killed by signal {-status} ({name}){hint}"
