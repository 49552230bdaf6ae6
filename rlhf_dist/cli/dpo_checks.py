"""What can be found wrong with a DPO run before a process is started: seconds, no weights loaded."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from rlhf_dist.cli.checks import check_context, check_engine, check_quantisation, check_vocabulary
from rlhf_dist.cli.sft_checks import CHECK_ROWS
from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.supervised import RowsSection
from rlhf_dist.data.answers import AnswersEncoder, fitted
from rlhf_dist.data.layouts import PreferencePair
from rlhf_dist.data.preferences import PreferenceReader
from rlhf_dist.data.reading import ReadOptions
from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.workers.rows import refusals


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
    return {"pairs looked at": _check_pairs(config.data, encoder)}


def _check_pairs(section: RowsSection, encoder: AnswersEncoder) -> int:
    """Reads and encodes the first pairs of every file as the run will; returns how many."""
    looked_at = 0
    for path in [*section.train, *section.eval]:
        for pair in itertools.islice(PreferenceReader([path], ReadOptions(section.faults), rankings="pairs"), CHECK_ROWS):
            assert isinstance(pair, PreferencePair)
            where = pair.origin.where
            looked_at += 1
            with refusals(section.faults, Counter()):
                rows = [encoder.encode(pair.prompt, text, where=where) for text in (pair.chosen, pair.rejected)]
                fitted(rows, section.max_tokens, section.overlong, where, encoder.bos)
    return looked_at
