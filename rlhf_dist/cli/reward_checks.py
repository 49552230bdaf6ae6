"""What can be found wrong with the training of a reward model before a process is started: seconds, no weights loaded."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rlhf_dist.cli.checks import check_context, check_engine, check_quantisation
from rlhf_dist.cli.sft_checks import CHECK_ROWS
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.data.answers import AnswersEncoder, fitted
from rlhf_dist.data.layouts import PreferencePair, Ranking
from rlhf_dist.data.preferences import PreferenceReader
from rlhf_dist.data.reading import ReadOptions
from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.models.reward_model import has_head, separate_pad
from rlhf_dist.workers.rows import refusals, spells_pad


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
        raise UserError("the report on held-out rows needs plotly", where="data.eval", fix="pip install plotly (extra `report`)")
    return {"rows looked at": sum(1 for _ in _rows(config))}


def _rows(config: RewardModelConfig) -> Iterator[None]:
    """The first rows of every file, encoded; stops at one that the run would stop at."""
    section, data = config.model, config.data
    tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
    stops = stop_tokens(section.model, tokenizer, trust_remote_code=section.trust_remote_code)
    pad = separate_pad(tokenizer, stops)
    encoder = AnswersEncoder(tokenizer, stops)
    for path in [*data.train, *data.eval]:
        for record in itertools.islice(PreferenceReader([path], ReadOptions(data.faults)), CHECK_ROWS):
            where = record.origin.where
            with refusals(data.faults, Counter()):
                rows = [encoder.encode(record.prompt, text, where=where) for text in _answers(record)]
                if data.faults == "error" and any(pad in row.tokens for row in rows):
                    raise spells_pad(where)
                fitted(rows, data.max_tokens, data.overlong, where, encoder.bos)
            yield


def _answers(record: PreferencePair | Ranking) -> tuple[str, ...]:
    return record.answers if isinstance(record, Ranking) else (record.chosen, record.rejected)
