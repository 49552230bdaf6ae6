"""The one binary: `rlhf-dist VERB`. A fault the user can mend is printed as one block and ends with status 2."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.text import Text

from rlhf_dist import __version__
from rlhf_dist.cli import compare as compare_command
from rlhf_dist.cli import config as config_command
from rlhf_dist.cli import data as data_command
from rlhf_dist.cli import dpo as dpo_command
from rlhf_dist.cli import export as export_command
from rlhf_dist.cli import ppo as ppo_command
from rlhf_dist.cli import replay as replay_command
from rlhf_dist.cli import report as report_command
from rlhf_dist.cli import reward as reward_command
from rlhf_dist.cli import score as score_command
from rlhf_dist.cli import sft as sft_command
from rlhf_dist.cli import toy as toy_command
from rlhf_dist.cli.interrupts import CTRL_C, Interrupted
from rlhf_dist.config.errors import UserError

app = typer.Typer(
    name="rlhf-dist",
    help="RLHF whose result does not depend on how the work was cut up.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(config_command.app, name="config")
app.add_typer(data_command.app, name="data")
app.command("sft")(sft_command.sft)
app.command("reward")(reward_command.reward)
app.command("dpo")(dpo_command.dpo)
app.command("ppo")(ppo_command.ppo)
app.command("score")(score_command.score)
app.command("compare")(compare_command.compare)
app.command("report")(report_command.report)
app.command("export")(export_command.export)
app.command("replay")(replay_command.replay)
app.command("toy")(toy_command.toy)


@app.command("version")
def version() -> None:
    """Prints the version."""
    print(__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns when all went well.

    The deepspeed launcher puts `--local_rank=N` first; the ranks know theirs from the environment.

    Raises:
        SystemExit: status 2 after an error the user can mend or a wrong command line, 130 after Ctrl-C, 143 after SIGTERM.
    """
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not re.fullmatch(r"--local[-_]rank=\d+", a)]
    try:
        app(args=given)
    except UserError as error:
        rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        Console(stderr=True, soft_wrap=True).print(Text(f"error{rank}: ", style="bold red") + Text(str(error)))
        raise SystemExit(2) from None
    except Interrupted as interrupted:
        _say_once(str(interrupted))
        raise SystemExit(interrupted.status) from None
    except SystemExit as ended:
        if ended.code == CTRL_C:
            _say_once("interrupted")
        if ended.code:
            raise


def _say_once(text: str) -> None:
    """All ranks of a launcher are interrupted together; the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True, soft_wrap=True).print(Text(text))


if __name__ == "__main__":
    main()
