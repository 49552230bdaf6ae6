"""`rlhf-dist sft`: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from rlhf_dist.cli.config import ConfigFile, Overrides


def sft(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fine-tunes a causal LM on prompt + completion rows or dialogues; the loss is on what the assistant says."""
    from rlhf_dist.cli.launching import launch
    from rlhf_dist.cli.paths import with_absolute_paths
    from rlhf_dist.config.loading import load_config
    from rlhf_dist.config.sft import SFTConfig

    root, first = launch(with_absolute_paths(load_config(SFTConfig, config, overrides or ())))
    if first:
        print(f"everything of this run: {root}")
