"""Rows of answers put together as one batch of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from rlhf_dist.contracts.preferences import PreferenceBatch
from rlhf_dist.data.answers import AnswersRow


def collate_answers(rows: Sequence[AnswersRow]) -> PreferenceBatch:
    """A batch of the rows, whose numbers of answers may differ; the texts stand row by row, best answer first."""
    texts = [answer.tokens for row in rows for answer in row.answers]
    counts = np.array([len(row.answers) for row in rows])
    tokens = np.zeros((len(texts), max(len(text) for text in texts)), np.int64)
    for number, text in enumerate(texts):
        tokens[number, : len(text)] = text
    lengths = np.array([len(text) for text in texts])
    mask_BK = np.arange(counts.max()) < counts[:, None]
    answers_BK = np.where(mask_BK, (counts.cumsum() - counts)[:, None] + np.arange(counts.max()), 0)
    return PreferenceBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None]),
        torch.from_numpy(answers_BK),
        torch.from_numpy(mask_BK),
        torch.tensor([row.margin or 0.0 for row in rows]),
        torch.tensor([math.nan if row.label_probability is None else row.label_probability for row in rows]),
        torch.tensor([row.weight for row in rows], dtype=torch.float32),
    )
