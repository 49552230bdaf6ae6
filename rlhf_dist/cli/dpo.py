"""`rlhf-dist dpo`: direct preference optimisation on pairs or rankings of answers."""

from __future__ import annotations

from rlhf_dist.cli.config import ConfigFile, Overrides


def dpo(config: ConfigFile, overrides: Overrides = None) -> None:
    """Trains a causal LM to prefer chosen answers to rejected ones, relative to a frozen reference; no reward model, no sampling."""
    from rlhf_dist.cli.launching import launch
    from rlhf_dist.cli.paths import with_absolute_paths
    from rlhf_dist.config.dpo import DPOConfig
    from rlhf_dist.config.loading import load_config

    root, first = launch(with_absolute_paths(load_config(DPOConfig, config, overrides or ())))
    if first:
        print(f"everything of this run: {root}")
