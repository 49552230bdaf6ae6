"""What a person sees while a run works: a live bar on a terminal, a plain line a step in a log, events to carry out of an actor."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rlhf_dist.runs.summary import headline


class Reporter(Protocol):
    """Told by the coordinator what happens; decides what to show."""

    def started(self, facts: Mapping[str, Any]) -> None:
        """Once, before the first step: what will run where."""
        ...

    def phase(self, step: int, name: str) -> None:
        """A phase of step `step` begins."""
        ...

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """`step` of `total` steps are done."""
        ...

    def message(self, text: str) -> None:
        """Something worth a line of its own."""
        ...

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Once, at the end: the contents of `summary.json`."""
        ...


@dataclass(frozen=True)
class Headline:
    """A metric that is shown while the run works: its name, its short label, its number format."""

    metric: str
    label: str
    format: str


HEADLINES = (
    Headline("objective/scores", "reward", ".3f"),
    Headline("eval/score", "held-out", ".3f"),
    Headline("loss", "loss", ".4f"),
    Headline("eval/loss", "held-out loss", ".4f"),
    Headline("eval/accuracy", "held-out accuracy", ".3f"),
    Headline("rewards/accuracies", "accuracy", ".3f"),
    Headline("rewards/margins", "margin", ".3f"),
    Headline("objective/kl", "kl", ".2f"),
    Headline("perf/tokens_per_second", "tokens/s", ".0f"),
    Headline("policy/clipfrac_avg", "clip", ".3f"),
    Headline("val/response_length", "length", ".1f"),
    Headline("perf/step_seconds", "s/step", ".1f"),
)


class ConsoleReporter:
    """Shows a run on a console.

    Args:
        console: where; by default standard output. A live bar when it is a terminal, otherwise one plain line a step.
        headlines: the metrics to show, in order; one that a step lacks is left out.
    """

    def __init__(self, console: Console | None = None, headlines: Iterable[Headline] = HEADLINES) -> None:
        self._console = console or Console()
        self._headlines = tuple(headlines)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def started(self, facts: Mapping[str, Any]) -> None:
        """Prints the facts, aligned, and starts the bar."""
        width = max((len(key) for key in facts), default=0)
        for key, value in facts.items():
            self.message(f"{key:<{width}}  {value}")
        if self._console.is_terminal:
            self._progress = _bar(self._console)
            self._task = self._progress.add_task("starting", total=None, metrics="")
            self._progress.start()

    def phase(self, step: int, name: str) -> None:
        """Names the phase on the bar; a log does not get a line for it."""
        if self._progress:
            self._progress.update(self._task, description=name)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar, or prints `step 3/15  reward 0.712  kl 1.23  ...`."""
        shown = "  ".join(f"{h.label} {metrics[h.metric]:{h.format}}" for h in self._headlines if h.metric in metrics)
        if self._progress:
            self._progress.update(self._task, completed=step, total=total, metrics=shown)
        else:
            self.message("  ".join(part for part in (f"step {step}/{total}", shown) if part))

    def message(self, text: str) -> None:
        """Prints a line, above the bar when there is one. Never wrapped: a log line must stay greppable."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Ends the bar and prints the main figures."""
        self.close()
        for line in headline(summary):
            self.message(line)

    def close(self) -> None:
        """Ends the bar, so that an error message is not drawn over. Safe to call twice."""
        if self._progress:
            self._progress.stop()
            self._progress = None


class Furthest:
    """Passes everything on, and remembers how far the run got. Begins a run on the console once, however often it is begun again."""

    def __init__(self, reporter: ConsoleReporter) -> None:
        self._reporter, self.furthest, self._started = reporter, 0, False

    def started(self, facts: Mapping[str, Any]) -> None:
        """The first time."""
        if not self._started:
            self._started = True
            self._reporter.started(facts)

    def phase(self, step: int, name: str) -> None:
        """As it is."""
        self._reporter.phase(step, name)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Remembers the step."""
        self.furthest = max(self.furthest, step)
        self._reporter.step(step, total, metrics)

    def message(self, text: str) -> None:
        """As it is."""
        self._reporter.message(text)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """As it is."""
        self._reporter.finished(summary)

    def close(self) -> None:
        """As it is."""
        self._reporter.close()


@dataclass(frozen=True)
class Event:
    """One call of a reporter, to be sent to another process."""

    method: str
    arguments: tuple[Any, ...]


class BufferedReporter:
    """Keeps events until another process fetches them. Thread-safe: the run writes while a caller drains."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._dropped = 0

    def started(self, facts: Mapping[str, Any]) -> None:
        """Keeps the call."""
        self._keep("started", dict(facts))

    def phase(self, step: int, name: str) -> None:
        """Keeps the call."""
        self._keep("phase", step, name)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Keeps the call."""
        self._keep("step", step, total, dict(metrics))

    def message(self, text: str) -> None:
        """Keeps the call."""
        self._keep("message", text)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Keeps the call."""
        self._keep("finished", dict(summary))

    def drain(self, since: int) -> list[Event]:
        """Events number `since` and later, in order; earlier ones have arrived and are forgotten.

        Asking again with the same number gives them again, so a lost answer loses nothing.

        Raises:
            ValueError: events from `since` on were already acknowledged, or there are not that many.
        """
        with self._lock:
            if not self._dropped <= since <= self._dropped + len(self._events):
                raise ValueError(f"asked for events from {since}; held are {self._dropped} to {self._dropped + len(self._events)}")
            del self._events[: since - self._dropped]
            self._dropped = since
            return list(self._events)

    def _keep(self, method: str, *arguments: Any) -> None:
        with self._lock:
            self._events.append(Event(method, arguments))


class NullReporter:
    """Says nothing: for every rank but the first."""

    def started(self, facts: Mapping[str, Any]) -> None:
        """Nothing."""

    def phase(self, step: int, name: str) -> None:
        """Nothing."""

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def replay(events: Iterable[Event], reporter: Reporter) -> None:
    """Tells a reporter what a `BufferedReporter` kept."""
    for event in events:
        getattr(reporter, event.method)(*event.arguments)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
        TimeElapsedColumn(),
        console=console,
    )
