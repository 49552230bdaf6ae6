"""What can be found wrong with an SFT run before a process is started: seconds, no weights loaded."""

from __future__ import annotations

from typing import Any

from rlhf_dist.cli.checks import check_context, check_engine, check_quantisation
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.workers.sft import look_at_sft_rows


def check_sft(config: SFTConfig) -> dict[str, Any]:
    """Checks DeepSpeed file, model, context, and the first rows of every file.

    Raises:
        UserError: the first fault.
    """
    section = config.model
    check_engine("model", section, config.placement.launcher, trained=section.optim.clip_norm)
    check_quantisation("model", section, section.model)
    check_context("model", section.model, config.data.max_tokens, trust_remote_code=section.trust_remote_code)
    tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
    return {"rows looked at": look_at_sft_rows(config, tokenizer)}
