"""The worker of supervised fine-tuning: demonstrations, a causal LM, the likelihood of what the assistant said."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rlhf_dist.algos.likelihood import nll_objective
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.config.supervised import RowsSection
from rlhf_dist.data.demonstrations import DemonstrationReader
from rlhf_dist.data.layouts import Demonstration
from rlhf_dist.data.token_rows import DemonstrationEncoder, TokenRow, collate_demonstrations, too_long
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.workers.capsules import CapsuleWriter
from rlhf_dist.workers.rows import Encode, look_at_rows, read_rows
from rlhf_dist.workers.supervised import Rows, SupervisedWorker
from rlhf_dist.workers.training import build_policy, seeded


def build_sft(config: SFTConfig, rank: Rank) -> SupervisedWorker:
    """Loads model and rows on this rank."""
    seeded(config.run.seed)
    section = config.model
    tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
    rows = sft_rows(config, tokenizer)
    engine = build_policy(section, config.run.seed, rank, config.training.total_steps(len(rows.train)))
    return SupervisedWorker(engine, nll_objective, rows, collate_demonstrations, tokenizer, CapsuleWriter(engine, tokenizer, config))


def sft_rows(config: SFTConfig, tokenizer: Any) -> Rows:
    """All rows as tokens; what was dropped or cut is counted by reason.

    Raises:
        UserError: a faulty or too long row where the config says `error`, or none left.
    """
    return read_rows(config.data, DemonstrationReader, _encode(config, tokenizer))


def look_at_sft_rows(config: SFTConfig, tokenizer: Any) -> int:
    """The look before it, at the first rows of every file; returns how many.

    Raises:
        UserError: no such model, a slow tokenizer, or a row that the run would stop at.
    """
    return look_at_rows(config.data, DemonstrationReader, _encode(config, tokenizer))


def _encode(config: SFTConfig, tokenizer: Any) -> Encode:
    stops = stop_tokens(config.model.model, tokenizer, trust_remote_code=config.model.trust_remote_code)
    encoder = DemonstrationEncoder(tokenizer, stops, config.sft.loss_on)
    return lambda record, fates: _row(record, encoder, config.data, fates)


def _row(record: Demonstration, encoder: DemonstrationEncoder, section: RowsSection, fates: Counter[str]) -> TokenRow | None:
    row, fate = encoder.encode(record), ""
    if len(row) > section.max_tokens:
        if section.overlong == "error":
            raise too_long(row, section.max_tokens, record.origin.where)
        if section.overlong == "drop":
            fates["dropped: longer than data.max_tokens"] += 1
            return None
        row, fate = row.cut(section.max_tokens), "cut: longer than data.max_tokens"
    if not row.weight:
        fates["dropped: nothing of the completion fits data.max_tokens" if fate else "dropped: a completion without a token"] += 1
        return None
    fates.update([fate] if fate else [])
    return row
