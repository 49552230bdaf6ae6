"""The parent's side: a broken protocol or an interrupt ends the process, so that no answer is taken for another's."""

import os
import threading
from pathlib import Path

import pytest

from rlhf_dist.contracts.reward import RewardRequest
from rlhf_dist.rewards.process import FunctionProcess, ProcessEnded

ROWS = RewardRequest(["p"], ["c"])


@pytest.fixture
def process(tmp_path: Path):
    (tmp_path / "r.py").write_text("import os, time\ndef reward(completions):\n    time.sleep(0.2)\n    return [1.0]")
    made = FunctionProcess("r", f"{tmp_path / 'r.py'}:reward")
    assert not made.alive and made.pid is None
    assert made.start(20.0) == {"ready": True}
    yield made
    made.kill()


def test_an_interrupted_call_leaves_no_answer_behind(process, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(process, "_answer", lambda deadline: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            process.ask(ROWS, 5.0)
    assert not process.alive
    process.start(20.0)
    assert process.ask(ROWS, 5.0)["values"] == [1.0]


@pytest.mark.parametrize("frame", [b"\xff" * 8, b"\x00" * 7 + b"\x01" + b"{"], ids=["endless", "no JSON"])
def test_an_answer_that_is_none_ends_the_process(process, frame, monkeypatch) -> None:
    content = [bytes([byte]) for byte in frame]
    connection = process._connection

    class Garbled:
        def recv(self, count: int) -> bytes:
            return content.pop(0)

        def __getattr__(self, name: str):
            return getattr(connection, name)

    process._connection = Garbled()
    with pytest.raises(ProcessEnded, match="misused its connection"):
        process.ask(ROWS, 5.0)
    assert not process.alive


def test_start_replaces_the_process(process) -> None:
    first = process.pid
    process.start(20.0)
    assert process.alive and process.pid != first


def test_it_may_be_started_by_a_thread_that_ends(tmp_path: Path, process) -> None:
    """A signal upon the parent's death would be one upon that thread's."""
    thread = threading.Thread(target=process.start, args=(20.0,))
    thread.start()
    thread.join()
    assert process.ask(ROWS, 5.0)["values"] == [1.0]


def test_a_fork_that_ends_leaves_the_process_alone(process) -> None:
    fork = os.fork()
    if fork == 0:
        process.kill()  # what its exit would do
        os._exit(0)
    os.waitpid(fork, 0)
    assert process.ask(ROWS, 5.0)["values"] == [1.0]


def test_a_process_that_someone_else_reaped_counts_as_dead(process) -> None:
    os.kill(process.pid, 9)
    os.waitpid(process.pid, 0)
    assert not process.alive
    process.start(20.0)
    assert process.ask(ROWS, 5.0)["values"] == [1.0]
