"""`rlhf-dist replay`: a skipped optimizer step once more, offline, in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rlhf_dist.runs.capsule import Capsule
    from rlhf_dist.workers.replay import Replay

SHOWN = 200
"""Letters of a text that are shown."""


def replay(
    capsule: Annotated[Path, typer.Argument(help="folder that a run wrote: run.output_dir/run.name/capsules/step_…")],
    device: Annotated[str, typer.Option(help="where the model goes: cpu, cuda")] = "cpu",
    gradient: Annotated[bool, typer.Option("--gradient/--no-gradient", help="also go back through the model")] = True,
) -> None:
    """Shows the loss of every row, which number is not finite, and the step's loss beside the one that was recorded.

    Ends with status 1 where the losses are others than were recorded.
    """
    from rlhf_dist.models.quiet import quiet_libraries

    quiet_libraries()
    from rlhf_dist.runs.capsule import read_capsule

    held = read_capsule(capsule)
    from rlhf_dist.workers.replay import replay as compute

    found = compute(held, device, gradient=gradient)
    console = Console(soft_wrap=True)
    console.print(_samples(found))
    for line in _verdict(held, found):
        console.print(Text(line))
    if not found.reproduced:
        raise typer.Exit(1)


def _samples(found: Replay) -> Table:
    table = Table(title="samples", title_justify="left")
    for name in ("rank", "batch", "sample", "tokens", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("not finite")
    for each in found.samples:
        known = (each.rank, each.microbatch, each.name, each.tokens)
        table.add_row(*map(str, known), f"{each.loss:.6g}", Text(each.fault.split(" is ")[0].removeprefix("the model's ")))
    return table


def _verdict(held: Capsule, found: Replay) -> list[str]:
    facts, lines = held.facts, []
    for each in found.samples:
        if each.fault:
            lines.append(f"{each.name}: {each.fault}")
            lines += [f"  {f'{what}:':<12}{_short(text)}" for what, text in each.texts.items()]
    for part in found.microbatches:
        lines.append(f"rank {part.rank}, microbatch {part.number}: loss {part.now:.9g}, recorded {part.recorded:.9g}")
    lines.append(f"step of the {facts.role} (the {facts.fault} was not finite): loss {found.loss:.9g}, recorded {held.loss:.9g}")
    if found.grad_norm is not None:
        odd = f"; not finite first at {found.gradient_fault}" if found.gradient_fault else ""
        lines.append(f"gradient norm {found.grad_norm:.9g}, recorded {facts.grad_norm:.9g}{odd}")
    lines.append("reproduced" if found.reproduced else _why_not(held, found))
    return lines


def _why_not(held: Capsule, found: Replay) -> str:
    if not math.isfinite(held.loss) and math.isfinite(found.loss):
        return "not reproduced: here the loss is finite; what was not came from the run's own device, kernels or code"
    return "not reproduced: the losses differ by more than rounding; hold the installed versions against those in capsule.json"


def _short(text: str) -> str:
    flat = repr(text)
    return flat if len(flat) <= SHOWN else f"{flat[:SHOWN]} …"
