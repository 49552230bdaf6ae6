"""A function in its own process: as fast as a call, and whatever it does there, the run hears of it and goes on."""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.reward import RewardRequest
from rlhf_dist.rewards.isolated import FunctionReward

ROWS = RewardRequest(("p1", "p2", "p3"), ("a", "bb", "ccc"), {"answer": (1, None, "x")})


@pytest.fixture
def reward_of(tmp_path: Path) -> Iterator[Callable[[str], FunctionReward]]:
    """`reward_of(code)`: the function `reward` of a file, in its process."""
    made: list[FunctionReward] = []

    def make(code: str, **options: float) -> FunctionReward:
        (tmp_path / "my_reward.py").write_text(code)
        made.append(FunctionReward("r", f"{tmp_path / 'my_reward.py'}:reward", **options))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def alive(pid: int) -> bool:
    """Whether a process runs; what is dead and not yet reaped by its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_values_columns_and_abstentions_come_through_bit_for_bit(reward_of) -> None:
    code = (
        "def reward(prompts, completions, answer):\n"
        "    assert answer == [1, None, 'x'] and prompts[2] == 'p3'\n"
        "    return [0.1, None, -5e-324]"
    )
    assert reward_of(code).attempt(ROWS, 5.0).values == (0.1, None, -5e-324)


def test_it_runs_elsewhere_and_its_output_is_seen(reward_of, capfd, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    reward = reward_of(
        "import os\ndef reward(completions):\n    print('hello from', os.getpid(), os.getcwd())\n    return [os.getpid()] * 3"
    )
    pid = reward.attempt(ROWS, 5.0).values[0]
    assert pid not in (None, os.getpid()) and capfd.readouterr().out == f"hello from {pid:.0f} {tmp_path}\n"


def test_one_process_serves_all_calls_and_keeps_its_state(reward_of) -> None:
    reward = reward_of("calls = []\ndef reward(completions):\n    calls.append(1)\n    return [len(calls)] * len(completions)")
    assert [reward.attempt(ROWS, 5.0).values[0] for _ in range(3)] == [1.0, 2.0, 3.0]


def test_an_exception_comes_back_as_text_with_its_traceback(reward_of, tmp_path: Path) -> None:
    attempt = reward_of("def reward(completions):\n    raise KeyError(completions[0])").attempt(ROWS, 5.0)
    failure = attempt.failures[0]
    assert (failure.kind, failure.what) == ("exception", "reward 'r' raised KeyError: 'a'")
    assert failure.where == f"{tmp_path / 'my_reward.py'}:2" and "raise KeyError(completions[0])" in failure.trace


REGEX = "import re\ndef reward(completions): return [bool(re.match('(a+)+$', 'a' * 64 + 'b'))]"  # never lets go of the interpreter


@pytest.mark.parametrize("code", ["import time\ndef reward(completions): time.sleep(99)", REGEX], ids=["sleep", "regex"])
def test_a_call_that_hangs_ends_in_time_with_all_its_processes_and_the_next_is_answered(code, reward_of, tmp_path: Path) -> None:
    helper = f"import subprocess\nhelper = subprocess.Popen(['sleep', '99'])\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(helper.pid))\n"
    reward = reward_of(helper + code)
    first, grandchild = reward._process.pid, int((tmp_path / "pid").read_text())
    began = time.monotonic()
    attempt = reward.attempt(ROWS, 0.3)
    assert 0.3 <= time.monotonic() - began < 1.5
    assert {failure.kind for failure in attempt.failures.values()} == {"timeout"} and attempt.timeouts == 1
    assert "did not answer within 0.3 s" in attempt.failures[0].what
    assert wait_until(lambda: not alive(first) and not alive(grandchild))
    (tmp_path / "my_reward.py").write_text("def reward(completions): return [1.0] * 3")
    assert reward.attempt(ROWS, 5.0).values == (1.0,) * 3


@pytest.mark.parametrize(
    "line, said",
    [
        ("os._exit(7)", "ended with exit status 7"),
        ("ctypes.string_at(0)", r"killed by signal 11 \(SIGSEGV\)"),
        ("os.kill(os.getpid(), 9)", r"killed by signal 9 \(SIGKILL\); the system does that when memory runs out"),
        ("os.closerange(3, 4096); time.sleep(99)", "closed or misused its connection"),
        ("os.fork() or time.sleep(99); os._exit(1)", "ended with exit status 1"),
    ],
)
def test_a_process_that_dies_is_a_failure_that_says_how(line, said, reward_of) -> None:
    reward = reward_of(f"import ctypes, os, time\ndef reward(completions):\n    if completions[0] == 'a': {line}\n    return [2.0]")
    failure = reward.attempt(ROWS, 20.0).failures[0]
    assert failure.kind == "death" and failure.of_call
    assert re.search(said, failure.what)
    assert reward.attempt(ROWS.select([1]), 5.0).values == (2.0,)


def test_code_that_cannot_be_loaded_any_more_stops_the_run_under_any_rule(reward_of, tmp_path: Path) -> None:
    reward = reward_of("import os\ndef reward(completions): os._exit(1)")
    reward.attempt(ROWS, 5.0)
    (tmp_path / "my_reward.py").write_text("def reward(:")
    with pytest.raises(UserError, match="syntax error"):
        reward.attempt(ROWS, 5.0)


def test_loading_has_a_limit_of_its_own(reward_of) -> None:
    with pytest.raises(UserError, match=r"was not loaded within 0\.2 s"):
        reward_of("import time; time.sleep(9)", start_timeout_s=0.2)
    with pytest.raises(UserError, match="could not be loaded: its process ended with exit status 3"):
        reward_of("import os; os._exit(3)")


def test_a_large_request_to_a_function_that_does_not_read_on_ends_in_time_too(reward_of) -> None:
    reward = reward_of("def reward(completions): return [1.0]")
    os.kill(reward._process.pid, signal.SIGSTOP)
    attempt = reward.attempt(RewardRequest(["p"], ["x" * 10_000_000]), 0.3)
    assert attempt.failures[0].kind == "timeout"
    assert reward.attempt(RewardRequest(["p"], ["x" * 10_000_000]), 20.0).values == (1.0,)


PARENT = """
import os, sys, threading, time
from rlhf_dist.rewards.isolated import FunctionReward
from rlhf_dist.contracts.reward import RewardRequest
reward = FunctionReward("r", sys.argv[1] + ":reward")
threading.Thread(target=reward.attempt, args=(RewardRequest(["p"], ["a"]), 99.0), daemon=True).start()
print(reward._process.pid, flush=True)
time.sleep(99)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda end: end.name)
def test_it_ends_with_its_parent_however_that_ends(end, tmp_path: Path) -> None:
    """Also when the function hangs without ever letting go of the interpreter, and with the processes that it started."""
    file = tmp_path / "hangs.py"
    file.write_text(f"import subprocess\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '99']).pid))\n" + REGEX)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child, grandchild = int(parent.stdout.readline()), int((tmp_path / "pid").read_text())
    time.sleep(0.2)  # the call is under way
    assert alive(child) and alive(grandchild)
    parent.send_signal(end)
    parent.communicate()
    assert wait_until(lambda: not alive(child) and not alive(grandchild), 3.0)


def test_it_ends_with_the_object(reward_of, tmp_path: Path) -> None:
    file = tmp_path / "fine.py"
    file.write_text("def reward(completions): return []")
    reward = FunctionReward("r", f"{file}:reward")
    pid = reward._process.pid
    del reward
    assert wait_until(lambda: not alive(pid))


def test_it_is_ready_soon_and_a_call_costs_little(reward_of) -> None:
    """Seen: 0.06 s and 0.1 ms. The limits are those of a loaded machine."""
    began = time.perf_counter()
    reward = reward_of("def reward(completions): return [float(len(c)) for c in completions]")
    assert time.perf_counter() - began < 2.0
    rows, spent = RewardRequest(["word " * 100] * 64, ["word " * 200] * 64, {"answer": ["w"] * 64}), []
    for _ in range(30):
        began = time.perf_counter()
        reward.attempt(rows, 5.0)
        spent.append(time.perf_counter() - began)
    assert statistics.median(spent) < 0.01
