"""`rlhf-dist reward`: a reward model from preferences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_dist.cli.config import ConfigFile, Overrides


def reward(config: ConfigFile, overrides: Overrides = None) -> None:
    """Trains a reward model on pairs, rankings or labelled answers, and reports on held-out ones."""
    from rlhf_dist.cli.launching import launch
    from rlhf_dist.cli.paths import with_absolute_paths
    from rlhf_dist.config.loading import load_config
    from rlhf_dist.config.reward_model import RewardModelConfig
    from rlhf_dist.runs.folder import RunFolder

    root, first = launch(with_absolute_paths(load_config(RewardModelConfig, config, overrides or ())))
    if first:
        show_report(json.loads(RunFolder(root).summary.read_text(encoding="utf-8"))["report"], root, Console())
        print(f"everything of this run: {root}")


def show_report(report: Mapping[str, Any], root: Path, console: Console) -> None:
    """Prints the main figures of the report, or why there is none."""
    from rlhf_dist.cli.report import facts_table
    from rlhf_dist.evaluation.report_facts import Fact

    if "none" in report:
        console.print(f"no report: {report['none']}", highlight=False, soft_wrap=True)
        return
    console.print(facts_table([Fact(**fact) for fact in report["facts"]], report["sides"]))
    console.print(f"report: {root / report['page']}", highlight=False, soft_wrap=True)
