"""What can be found wrong with a DPO run before a process is started: seconds, no weights loaded."""

from __future__ import annotations

from typing import Any

from rlhf_dist.cli.checks import check_context, check_engine, check_quantisation, check_vocabulary
from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.data.answers import AnswersEncoder
from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.workers.rows import look_at_preferences


def check_dpo(config: DPOConfig) -> dict[str, Any]:
    """Checks DeepSpeed file, model, reference, contexts, and the first rows of every file.

    Raises:
        UserError: the first fault.
    """
    section, reference, trust = config.model, config.reference.model, config.model.trust_remote_code
    check_engine("model", section, config.placement.launcher, trained=section.optim.clip_norm)
    check_context("model", section.model, config.data.max_tokens, trust_remote_code=trust)
    check_quantisation("model", section, section.model)
    tokenizer = load_tokenizer(section.model, trust_remote_code=trust)
    if reference:
        check_context("reference", reference, config.data.max_tokens, trust_remote_code=trust)
        check_quantisation("reference", section, reference)
        check_vocabulary("reference", reference, tokenizer, trust_remote_code=trust, trained="model")
    encoder = AnswersEncoder(tokenizer, stop_tokens(section.model, tokenizer, trust_remote_code=trust))
    return {"pairs looked at": look_at_preferences(config.data, encoder, as_pairs=True)}
