"""`rlhf-dist config show|validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_dist.config.loading import dump_config, load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.models.quiet import quiet_libraries

app = typer.Typer(help="Look at a configuration.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value; wins over the file")]


@app.command("show")
def show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Prints the resolved configuration, defaults included."""
    print(dump_config(load_config(PPOConfig, config, overrides or ())), end="")


@app.command("validate")
def validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Checks a configuration and what it names: data, models, rewards, DeepSpeed files. Starts nothing."""
    from rlhf_dist.cli.checks import check_run
    from rlhf_dist.cli.paths import with_absolute_paths

    quiet_libraries()
    facts = check_run(with_absolute_paths(load_config(PPOConfig, config, overrides or ())))
    print("valid: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
