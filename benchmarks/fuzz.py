"""Does a damaged file ever show the user a traceback, stop the program, or pass for data?

Data files, configs and checkpoints are damaged as a seed draws it, and read by the program's own readers, in a process of their own with a
time limit for each. What the readers accept is held against what another reader says stands in the file.

    python benchmarks/fuzz.py --files 10000

Printed and kept, by kind of file: how many were accepted (equal to the original, or consistent: as the other reader has them) or refused
with one message; and TRACEBACK, BAD DATA ACCEPTED, HANG, CRASH (the process died) and MEMORY (more than 512 MiB for one file), each
with the numbers of the cases, by which `--only KIND --first NUMBER --files 1` makes them again.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS, manifest, write
from rich.console import Console
from rich.table import Table

GOOD = ("equal", "consistent", "refused")
BAD = ("TRACEBACK", "BAD DATA ACCEPTED", "HANG", "CRASH", "MEMORY")
MEMORY_KIB = 512 * 1024
START_S = 120.0


@dataclass(frozen=True)
class Verdict:
    """What became of one damaged file; detail: the error, shortened."""

    kind: str
    number: int
    outcome: str
    detail: str = ""


def main(
    files: Annotated[int, typer.Option(help="damaged files, of all kinds in turn")] = 10_000,
    seed: Annotated[int, typer.Option(help="of the damage")] = 0,
    first: Annotated[int, typer.Option(help="number of the first case of each kind")] = 0,
    only: Annotated[str, typer.Option(help="one kind alone")] = "",
    limit_s: Annotated[float, typer.Option(help="longest that one file may take")] = 10.0,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
) -> None:
    """Reads them all, prints a table. Status 1 where anything happened that must not."""
    began, console, found = time.monotonic(), Console(width=140), list[Verdict]()
    for each in fuzz(files, seed, limit_s, first=first, only=only):
        found.append(each)
        if each.outcome in BAD:
            console.print(f"{each.kind} {each.number}: {each.outcome}\n{each.detail}", markup=False)
    report: dict[str, Any] = {"manifest": asdict(manifest("fuzz", {"files": files, "seed": seed, "first": first, "only": only}, 1, "cpu"))}
    report |= {
        "seconds": time.monotonic() - began,
        "outcomes": counted(found),
        "bad": [asdict(each) for each in found if each.outcome in BAD],
    }
    console.print(table(report["outcomes"]))
    path = write("fuzz" if not only else f"fuzz_{only.replace(' ', '-')}", report, results)
    console.print(f"{len(found)} files in {report['seconds']:.0f} s; kept in {path}", soft_wrap=True)
    if report["bad"]:
        raise SystemExit(1)


def fuzz(files: int, seed: int, limit_s: float, *, first: int = 0, only: str = "") -> Iterator[Verdict]:
    """The verdicts on `files` cases, all kinds in turn.

    Raises:
        ValueError: there is no kind `only`.
    """
    from damaged_files import KINDS

    kinds = [kind for kind in KINDS if only in ("", kind)]
    if not kinds:
        raise ValueError(f"there is no kind {only!r}: {', '.join(KINDS)}")
    reader = None
    try:
        for case in range(files):
            reader = reader or Reader(seed)
            kind, number = kinds[case % len(kinds)], first + case // len(kinds)
            outcome, detail = reader.read(kind, number, limit_s)
            if outcome == "HANG":  # asked again: the machine may have been busy with something else
                reader.close()
                reader = Reader(seed)
                outcome, detail = reader.read(kind, number, limit_s)
            if outcome in ("HANG", "CRASH"):
                reader.close()
                reader = None
            yield Verdict(kind, number, outcome, detail)
    finally:
        if reader:
            reader.close()


class Reader:
    """A process that makes and reads damaged files, one after another."""

    def __init__(self, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, seed), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_S):
            raise RuntimeError("the reading process does not start")
        self._peak: int = self._pipe.recv()

    def read(self, kind: str, number: int, limit_s: float) -> tuple[str, str]:
        """Outcome and detail of a case."""
        self._pipe.send((kind, number))
        if not self._pipe.poll(limit_s):
            return "HANG", f"no answer within {limit_s} s"
        try:
            outcome, detail, peak = self._pipe.recv()
        except EOFError:
            self._process.join()
            return "CRASH", f"the process ended with {self._process.exitcode}"
        grown, self._peak = peak - self._peak, max(peak, self._peak)
        return ("MEMORY", f"{grown >> 10} MiB more") if grown > MEMORY_KIB else (outcome, detail)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def serve(pipe: Connection, seed: int) -> None:
    """The other side of `Reader`."""
    from damaged_files import Cases

    cases = Cases(seed)
    pipe.send(_peak())
    while True:
        kind, number = pipe.recv()
        pipe.send((*cases.judge(kind, number), _peak()))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def counted(found: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    """Cases by kind and outcome."""
    kinds = dict.fromkeys(each.kind for each in found)
    return {kind: dict(Counter(each.outcome for each in found if each.kind == kind)) for kind in kinds}


def table(outcomes: dict[str, dict[str, int]]) -> Table:
    """One row a kind, and their sum."""
    shown = Table("kind", "files", *GOOD, *BAD)
    total: Counter[str] = Counter()
    for kind, counts in outcomes.items():
        total.update(counts)
        shown.add_row(kind, str(sum(counts.values())), *(str(counts.get(name, 0)) for name in (*GOOD, *BAD)))
    shown.add_row("all", str(total.total()), *(str(total[name]) for name in (*GOOD, *BAD)))
    return shown


if __name__ == "__main__":
    typer.run(main)
