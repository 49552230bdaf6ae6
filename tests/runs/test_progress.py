from __future__ import annotations

import io
import pickle
import threading
from typing import Any

import pytest
from rich.console import Console

from rlhf_dist.runs.progress import BufferedReporter, ConsoleReporter, Event, Headline, NullReporter, Reporter, replay

METRICS = {"objective/scores": 0.7123, "objective/kl": 1.234, "perf/tokens_per_second": 1234.4, "loss/policy_avg": 0.5}


def log_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def tell(reporter: Reporter) -> None:
    reporter.started({"run": "demo", "policy": "tiny [bold]"})
    reporter.phase(0, "generate")
    reporter.step(3, 15, METRICS)
    reporter.message("KL is high")
    reporter.finished({"steps": 15, "wall_seconds": 61.04, "kl": 2.5})


def test_a_log_gets_one_unwrapped_line_a_step() -> None:
    console = log_console()
    tell(ConsoleReporter(console))
    assert text_of(console).splitlines() == [
        "run     demo",
        "policy  tiny [bold]",
        "step 3/15  reward 0.712  kl 1.23  tokens/s 1234",
        "KL is high",
        "finished 15 steps in 61.0 s",
        "kl per sequence 2.50 nats",
    ]


def test_the_shown_metrics_can_be_chosen_and_may_be_absent() -> None:
    console = log_console()
    reporter = ConsoleReporter(console, [Headline("loss/policy_avg", "loss", ".2f"), Headline("absent", "x", ".1f")])
    reporter.step(1, 2, METRICS)
    reporter.step(2, 2, {})
    assert text_of(console).splitlines() == ["step 1/2  loss 0.50", "step 2/2"]


def test_a_terminal_gets_a_live_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    reporter = ConsoleReporter(console)
    reporter.started({"run": "demo"})
    reporter.phase(2, "generate")
    reporter.step(3, 15, METRICS)
    reporter.message("a line above the bar")
    reporter.close()
    reporter.close()
    shown = text_of(console)
    assert "3/15" in shown and "generate" in shown and "reward 0.712" in shown and "a line above the bar" in shown
    assert "step 3/15" not in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor must come back"


def test_buffered_events_replay_to_the_same_output_even_pickled() -> None:
    buffered, direct, replayed = BufferedReporter(), log_console(), log_console()
    tell(ConsoleReporter(direct))
    tell(buffered)
    replay(pickle.loads(pickle.dumps(buffered.drain(0))), ConsoleReporter(replayed))
    assert text_of(replayed) == text_of(direct)


def test_drain_repeats_until_acknowledged() -> None:
    reporter = BufferedReporter()
    reporter.message("a")
    reporter.message("b")
    assert reporter.drain(0) == reporter.drain(0) == [Event("message", ("a",)), Event("message", ("b",))]
    reporter.message("c")
    assert reporter.drain(2) == [Event("message", ("c",))]
    assert reporter.drain(3) == []
    for since in (0, 4):
        with pytest.raises(ValueError, match="held are 3 to 3"):
            reporter.drain(since)


def test_events_do_not_change_with_what_the_caller_does_later() -> None:
    reporter = BufferedReporter()
    metrics = {"a": 1.0}
    reporter.step(1, 1, metrics)
    metrics["a"] = 2.0
    assert reporter.drain(0) == [Event("step", (1, 1, {"a": 1.0}))]


def test_writers_and_a_reader_at_once_lose_and_repeat_nothing() -> None:
    reporter = BufferedReporter()
    writers, each = 4, 500

    def write(writer: int) -> None:
        for number in range(each):
            reporter.message(f"{writer}:{number}")

    threads = [threading.Thread(target=write, args=(w,)) for w in range(writers)]
    seen: list[str] = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or len(seen) < writers * each:
        seen += [event.arguments[0] for event in reporter.drain(len(seen))]
    assert len(seen) == writers * each
    for writer in range(writers):
        assert [s for s in seen if s.startswith(f"{writer}:")] == [f"{writer}:{n}" for n in range(each)]


def test_the_null_reporter_takes_everything(capsys: pytest.CaptureFixture[str]) -> None:
    tell(NullReporter())
    assert capsys.readouterr() == ("", "")


def test_finished_shows_held_out_reward_with_its_interval() -> None:
    console = log_console()
    interval: dict[str, Any] = {"mean": 0.57, "low": 0.55, "high": 0.59}
    after = {"mean": 0.86, "low": None, "high": None}
    ConsoleReporter(console).finished({"held_out": {"before": {"score": interval}, "after": {"score": after}}, "dropped": {"abstained": 3}})
    assert text_of(console).splitlines() == ["held-out reward 0.570 [0.550, 0.590] -> 0.860", "dropped samples: 3 abstained"]
