"""The function's process: it loads fast because it loads little, and it goes when its parent's end of the pipe closes."""

import os
import signal
import socket
import subprocess
import sys

from rlhf_dist.rewards.child import LENGTH, end_with_parent, main


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, rlhf_dist.rewards.child; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {name for name in ("torch", "numpy", "pydantic", "transformers", "ray", "httpx2", "asyncio") if f"'{name}'" in loaded}


def test_a_lifeline_that_is_closed_already_ends_the_group() -> None:
    watched, lifeline = os.pipe()
    os.close(lifeline)
    code = f"import time\nfrom rlhf_dist.rewards.child import end_with_parent\nend_with_parent({watched})\ntime.sleep(99)"
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=(watched,), start_new_session=True)
    os.close(watched)
    assert child.wait(timeout=20) == -signal.SIGKILL


def test_end_with_parent_is_what_main_calls_first(monkeypatch) -> None:
    """A function that cannot be loaded is refused, and the process ends by itself."""
    ours, theirs = socket.socketpair()
    called: list[int] = []
    monkeypatch.setattr("rlhf_dist.rewards.child.end_with_parent", called.append)
    main("r", "no.such.module:f", theirs.detach(), 9)
    (length,) = LENGTH.unpack(ours.recv(LENGTH.size))
    assert called == [9] and b"there is no module" in ours.recv(length) and ours.recv(1) == b""
    ours.close()
    assert callable(end_with_parent)
