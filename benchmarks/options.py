"""The command line that `roofline.py` and `scaling.py` share: what a PPO iteration of random Llamas is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS
from workload import Shape


@dataclass(frozen=True)
class Options:
    """What was asked for.

    dtype: float32 or bfloat16. ragged: log-normal lengths, or all of full length. rows, limit: completions, and tokens of the longest.
    repeats, warm_up: iterations that are timed, and those before. overrides: `key.path=value` of the PPO config.
    """

    rows: int
    limit: int
    dtype: str = "float32"
    ragged: bool = True
    repeats: int = 5
    warm_up: int = 1
    threads: int = 2
    shape: Shape = field(default_factory=Shape)
    overrides: tuple[str, ...] = ()
    results: Path = RESULTS

    @property
    def workload(self) -> dict[str, Any]:
        """For the job and its manifest."""
        facts = {"dtype": self.dtype, "ragged": self.ragged, "rows": self.rows, "limit": self.limit, "minibatches": 4}
        return facts | {"overrides": list(self.overrides)} | asdict(self.shape)

    @property
    def lengths(self) -> str:
        """As names of reports call them."""
        return "ragged" if self.ragged else "full"

    def title(self, device: str) -> str:
        """Of the table."""
        return f"{self.dtype}, {self.rows} rows of up to {self.limit} tokens, {self.threads} threads, {device}"


def command(run: Callable[[Options], None], defaults: Options) -> None:
    """Starts a script with the options that stand on the command line, `defaults` where none does."""

    def main(
        overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value of the PPO config")] = None,
        dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = defaults.dtype,
        ragged: Annotated[bool, typer.Option("--ragged/--full", help="log-normal lengths, or all of full length")] = defaults.ragged,
        rows: Annotated[int, typer.Option(help="completions of an iteration (scaling: of the smaller batch)")] = defaults.rows,
        limit: Annotated[int, typer.Option(help="longest completion, in tokens (scaling: of the shorter rows)")] = defaults.limit,
        repeats: Annotated[int, typer.Option(help="timed iterations of each")] = defaults.repeats,
        warm_up: Annotated[int, typer.Option(help="iterations before those")] = defaults.warm_up,
        threads: Annotated[int, typer.Option(help="CPU threads")] = defaults.threads,
        hidden: Annotated[int, typer.Option(help="hidden size")] = defaults.shape.hidden,
        layers: Annotated[int, typer.Option(help="layers")] = defaults.shape.layers,
        vocabulary: Annotated[int, typer.Option(help="words of the tokenizer")] = defaults.shape.vocabulary,
        results: Annotated[Path, typer.Option(help="folder of the JSON")] = defaults.results,
    ) -> None:
        shape = Shape(hidden, layers, vocabulary)
        run(Options(rows, limit, dtype, ragged, repeats, warm_up, threads, shape, tuple(overrides or ()), results))

    main.__doc__ = run.__doc__
    typer.run(main)
