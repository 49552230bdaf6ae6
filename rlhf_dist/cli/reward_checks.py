"""What can be found wrong with the training of a reward model before a process is started: seconds, no weights loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

from rlhf_dist.cli.checks import check_context, check_engine, check_quantisation
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.data.answers import AnswersEncoder
from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.models.reward_model import has_head, separate_pad
from rlhf_dist.workers.rows import look_at_preferences


def check_reward_model(config: RewardModelConfig) -> dict[str, Any]:
    """Checks DeepSpeed file, model, context, and the first rows of every file.

    Returns:
        Facts worth showing.

    Raises:
        UserError: the first fault.
    """
    section, data = config.model, config.data
    check_engine("model", section, config.placement.launcher, trained=section.optim.clip_norm)
    check_context("model", section.model, data.max_tokens, trust_remote_code=section.trust_remote_code)
    has_head(section, section.model)
    check_quantisation("model", section, section.model, classifier=True)
    if (data.eval or data.eval_fraction) and importlib.util.find_spec("plotly") is None:
        raise UserError("the report on held-out rows needs plotly", where="data.eval", fix="pip install plotly")
    tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
    stops = stop_tokens(section.model, tokenizer, trust_remote_code=section.trust_remote_code)
    pad = separate_pad(tokenizer, stops)
    return {"rows looked at": look_at_preferences(data, AnswersEncoder(tokenizer, stops), as_pairs=False, pad=pad)}
