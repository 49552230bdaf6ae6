"""What can be found wrong with an SFT run before a process is started: seconds, no weights loaded."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from rlhf_dist.cli.checks import check_context, check_engine, check_quantisation
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.data.demonstrations import DemonstrationReader
from rlhf_dist.data.reading import ReadOptions
from rlhf_dist.data.token_rows import too_long
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.workers.rows import refusals
from rlhf_dist.workers.sft import sft_encoder

CHECK_ROWS = 256


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
    encoder = sft_encoder(config, tokenizer)
    looked_at = 0
    for path in [*config.data.train, *config.data.eval]:
        for record in itertools.islice(DemonstrationReader([path], ReadOptions(config.data.faults)), CHECK_ROWS):
            looked_at += 1
            with refusals(config.data.faults, Counter()):
                row = encoder.encode(record)
                if len(row) > config.data.max_tokens and config.data.overlong == "error":
                    raise too_long(row, config.data.max_tokens, record.origin.where)
    return {"rows looked at": looked_at}
