"""A reward model in the making: a backbone with a head of one output, and a pad token that no text holds.

Transformers reads the score of a decoder at the rightmost token that is not the pad. So the pad must be none of the tokens that end a
text: with pad = eos it would skip the eos, which our rows end in (NUMERICS section 1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.preferences import PreferenceBatch
from rlhf_dist.models.adapters import find_adapter
from rlhf_dist.models.classifier import ClassifierModule, EncodedTexts
from rlhf_dist.models.loading import load_config, load_token_scorer, load_tokenizer, local, stop_tokens
from rlhf_dist.models.padding import grow_embeddings, name_pad

PAD = "<|pad|>"
HEAD = "score"


class RewardModelModule(ClassifierModule):
    """A sequence classifier with one output that scores the answers of a `PreferenceBatch`: `score_B` has one score a text."""

    def inputs(self, batch: PreferenceBatch) -> dict[str, Tensor]:  # type: ignore[override]
        """Keyword arguments of `forward`: the texts."""
        return super().inputs(EncodedTexts(batch.tokens_NL, batch.mask_NL))

    def blank(self) -> PreferenceBatch:  # type: ignore[override]
        """One text of one token, in no pair."""
        text, none = super().blank(), torch.zeros(0)
        index = torch.zeros(0, 2, dtype=torch.long)
        return PreferenceBatch(text.tokens_BL, text.mask_BL, index, index.bool(), none, none, none)


def separate_pad(tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> int:
    """Gives the tokenizer, in place, a pad token that no text holds, and padding on the right; returns the pad's id.

    Its own pad token stays when it is a special token and neither starts nor ends nor replaces text; otherwise `<|pad|>` is added.

    Args:
        tokenizer: of the model.
        stops: ids that end a completion.
    """
    known: Any = tokenizer
    taken = {known.bos_token_id, known.eos_token_id, known.unk_token_id, *stops}
    pad = known.pad_token_id
    added = known.added_tokens_decoder.get(pad)
    if pad is None or pad in taken or added is None or not added.special:
        known.add_special_tokens({"pad_token": PAD})
    known.padding_side = "right"
    return int(known.pad_token_id)


def load_reward_model(section: EngineSection, path: str, pad: int, seed: int) -> nn.Module:
    """A sequence classifier with one output, dropout off, which knows the pad.

    A classifier with one label keeps its head. A language model gets one of std 1/√(d+1), bias 0 (NUMERICS section 1).

    Args:
        section: precision, attention kernel, quantisation.
        path: Hugging Face folder, or cached hub name.
        pad: id of the pad token; the embeddings get a row for it (of zeros) where they have none.
        seed: of the head.

    Raises:
        UserError: no such model, one without a classification form, or a classifier with several labels.
    """
    own_head = has_head(section, path)
    model: Any = load_token_scorer(section, path, zero_head=not own_head)
    if not own_head:
        _start_head(model.get_submodule(HEAD), seed)
    grow_embeddings(model, pad + 1)
    name_pad(model.config, pad)
    return model  # type: ignore[no-any-return]


def tokenizer_for(config: Any, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that was trained from another: where that trained with a pad of its own, the tokenizer knows it too.

    Args:
        config: of the trained model. path: the model that it was trained from.

    Raises:
        UserError: no such model, or one without a tokenizer.
    """
    trained = load_tokenizer(path)
    with_pad = copy.deepcopy(trained)
    pad = separate_pad(with_pad, stop_tokens(path, trained))
    return with_pad if pad == config.get_text_config().pad_token_id else trained


def has_head(section: EngineSection, path: str) -> bool:
    """Whether a folder (or that of an adapter) holds a classifier's head; of one output, then.

    Raises:
        UserError: no such model, or a classifier with several labels.
    """
    config, adapter = load_config(path, trust_remote_code=section.trust_remote_code), find_adapter(local(path))
    labels = adapter.labels if adapter is not None else None
    if labels is None and any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ()):
        labels = config.num_labels
    if labels not in (None, 1):
        fix = "start from a language model, or from a reward model with num_labels=1"
        raise UserError(f"the classifier has {labels} labels, a reward model has one", where=path, fix=fix)
    return labels == 1


def _start_head(head: nn.Linear, seed: int) -> None:
    """Drawn in fp32 from a generator of its own, so that all ranks and precisions start alike."""
    draw = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(draw)
        if head.bias is not None:
            head.bias.zero_()
