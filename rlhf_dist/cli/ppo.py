"""`rlhf-dist ppo`: checks everything that can be checked without starting anything, then composes and runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rlhf_dist.cli.config import ConfigFile, Overrides
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig


def ppo(config: ConfigFile, overrides: Overrides = None) -> None:
    """Aligns a policy by PPO (or REINFORCE, RLOO, GRPO: algorithm.estimator)."""
    from rlhf_dist.cli.paths import with_absolute_paths

    run_ppo(with_absolute_paths(load_config(PPOConfig, config, overrides or ())))


def run_ppo(config: PPOConfig) -> Path:
    """Runs PPO with the launcher of the config; returns the run folder.

    Raises:
        UserError: anything the user can mend.
    """
    from rlhf_dist.cli.launching import launch

    root, first = launch(config)
    if first:
        show_before_after(root, Console())
    return root


def show_before_after(root: Path, console: Console) -> None:
    """Prints the before/after tables of a finished run, where it had held-out prompts."""
    from rlhf_dist.evaluation.before_after import compare, representative
    from rlhf_dist.evaluation.tables import headline_table, samples_table
    from rlhf_dist.runs.folder import RunFolder

    evaluations = sorted(RunFolder.open(root).evaluation.glob("step_*.parquet"))
    if len(evaluations) >= 2:
        comparison = compare(evaluations[0], evaluations[-1])
        console.print(samples_table(representative(comparison)))
        console.print(headline_table(comparison))
    console.print(f"everything of this run: {root}", soft_wrap=True)
