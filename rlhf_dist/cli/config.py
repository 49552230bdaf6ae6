"""`rlhf-dist config show|validate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rlhf_dist.config.loading import dump_config, load_config, read_values
from rlhf_dist.config.section import Section
from rlhf_dist.config.stages import config_of, stage_of
from rlhf_dist.models.quiet import quiet_libraries

app = typer.Typer(help="Look at a configuration.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value; wins over the file")]
StageName = Annotated[str, typer.Option("--stage", help="sft, reward, dpo or ppo; by default its sections tell", show_default=False)]


@app.command("show")
def show(config: ConfigFile, overrides: Overrides = None, stage: StageName = "") -> None:
    """Prints the resolved configuration, defaults included."""
    print(dump_config(_loaded(config, overrides or (), stage)), end="")


@app.command("validate")
def validate(config: ConfigFile, overrides: Overrides = None, stage: StageName = "") -> None:
    """Checks a configuration and what it names: data, models, rewards, DeepSpeed files. Starts nothing."""
    loaded = _loaded(config, overrides or (), stage)
    quiet_libraries()
    from rlhf_dist.cli.paths import with_absolute_paths
    from rlhf_dist.cli.programs import program_of

    facts = program_of(with_absolute_paths(loaded)).check()
    print("valid: " + ", ".join(f"{name} {value}" for name, value in facts.items()))


def _loaded(config: Path, overrides: Sequence[str], stage: str) -> Section:
    return load_config(config_of(stage or stage_of(read_values(config, overrides), str(config))), config, overrides)
