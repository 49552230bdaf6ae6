"""The module inside a reward engine: any Hugging Face sequence classifier, run through its own forward and its own pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.models.head import wants_one_row
from rlhf_dist.models.inputs import width_step
from rlhf_dist.models.loading import context_length, load_pretrained
from rlhf_dist.models.packing import HEAD_ROUNDING, lively_head, packed_rows, refusal, refuse_leaks
from rlhf_dist.models.padding import embedding_rows

Transform = Literal["logit", "probability", "log_odds"]


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as the reward model's tokens.

    tokens_BL int64, right-padded with anything; mask_BL bool: the tokens that exist, from the left without gaps;
    truncated: rows that lost tokens. A row without a token cannot be scored.
    """

    tokens_BL: Tensor
    mask_BL: Tensor
    truncated: int = 0

    def __len__(self) -> int:
        return int(self.tokens_BL.shape[0])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [int(length) for length in self.mask_BL.sum(1)]

    def select(self, rows: Sequence[int]) -> EncodedTexts:
        """The given rows in the given order, with the padding that they still need. Truncations stay counted in the whole."""
        index = torch.as_tensor(rows, dtype=torch.long)
        mask_BL = self.mask_BL[index]
        width = int(mask_BL.sum(1).max()) if rows else 0
        return EncodedTexts(self.tokens_BL[index, :width], mask_BL[:, :width])

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], truncated: int = 0) -> EncodedTexts:
        """Pads lists of token ids."""
        width = max((len(row) for row in rows), default=0)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        lengths_B1 = torch.tensor([len(row) for row in rows], dtype=torch.long).reshape(-1, 1)
        return cls(tokens, torch.arange(width) < lengths_B1, truncated)


class ClassifierModule(nn.Module):
    """A sequence classifier that answers with one number a row.

    Args:
        model: a Hugging Face `*ForSequenceClassification`, dropout off.
        label: which output to read; needed when there are several.
        transform: what to make of it; needed when there are several, the logit otherwise.
        packing: put several texts in one row (`models.packing`); what comes out is the same up to rounding.

    Raises:
        UserError: several outputs without label and transform, or a label that does not exist; packing, and a model in which packed texts
            see each other or which does not read its scores at the last token, through a layer named `score`.
    """

    def __init__(
        self, model: PreTrainedModel, label: int | None = None, transform: Transform | None = None, *, packing: bool = False
    ) -> None:
        super().__init__()
        self.model: Any = model
        config: Any = model.config
        labels = int(config.num_labels)
        if labels > 1 and (label is None or transform is None):
            names = ", ".join(f"{index} = {name}" for index, name in sorted(config.id2label.items()))
            raise UserError(
                f"the reward model has {labels} outputs ({names})",
                where=str(config.name_or_path),
                fix="set label (which output) and transform (logit, probability or log_odds) of this reward",
            )
        self.label = label or 0
        self.transform: Transform = transform or "logit"
        if self.label >= labels:
            raise UserError(
                f"label {label} does not exist: the reward model has {labels} outputs",
                where=str(config.name_or_path),
                fix="count labels from 0",
            )
        # One output, or several that do not exclude each other: each is a yes-or-no question of its own.
        self._independent = labels == 1 or getattr(config, "problem_type", None) == "multi_label_classification"
        self._vocabulary = embedding_rows(model)
        self.packing = packing
        if packing:
            self._try_packing()

    @property
    def context_tokens(self) -> int | None:
        """Longest input in tokens; None where the model does not say. RoBERTa counts positions from its padding index + 1."""
        length = context_length(self.model.config)
        tables = [m for name, m in self.model.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
        reserved = max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
        return None if length is None else length - reserved

    def input_limit(self, wanted: int | None) -> int | None:
        """The limit for this model's inputs, in tokens: what the config wants, by default the model's context.

        Raises:
            UserError: more is wanted than the model can take.
        """
        context = self.context_tokens
        if wanted is not None and context is not None and wanted > context:
            raise UserError(
                f"max_tokens is {wanted}, but the reward model's context is {context} tokens",
                where=str(self.model.config.name_or_path),
                fix=f"set max_tokens to {context} or less",
            )
        return context if wanted is None else wanted

    def forward(self, tokens: dict[str, Tensor], last_B: Tensor | None = None) -> dict[str, Tensor]:
        """Scores of the texts.

        Args:
            tokens: input_ids int64 [B, L], right-padded with anything, and attention_mask bool [B, L]; or those of `packed_rows`.
            last_B: slots of packed texts at which their scores are read, None for padded ones.

        Returns:
            score_B: float32.

        Raises:
            UserError: the model does not answer with one row of logits a sequence.
        """
        logits_BC = self._padded(**tokens) if last_B is None else self._packed(tokens, last_B)
        return {"score_B": self._score(logits_BC.float())}

    def _padded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Through the model's own forward, with its own pooling."""
        mask_BL = attention_mask.bool()
        named = self._own_pad()
        pad = _absent_id(input_ids, mask_BL, self._vocabulary) if named is None else named
        with _PadId(self.model.config, pad):
            output = self.model(input_ids=torch.where(mask_BL, input_ids, pad), attention_mask=mask_BL.long())
        logits: Tensor = output.logits
        if logits.shape != (input_ids.shape[0], self.model.config.num_labels):
            raise UserError(
                f"the reward model answers with logits of shape {tuple(logits.shape)} for {input_ids.shape[0]} sequences",
                where=str(self.model.config.name_or_path),
                fix="use a sequence classifier: one row of num_labels logits a sequence",
            )
        return logits

    def _packed(self, tokens: dict[str, Tensor], last_B: Tensor) -> Tensor:
        model = self._base
        hidden = getattr(model, model.base_model_prefix)(**tokens, use_cache=False).last_hidden_state
        return model.score(hidden.flatten(0, 1).index_select(0, last_B))  # type: ignore[no-any-return]

    def inputs(self, texts: EncodedTexts) -> dict[str, Any]:
        """Keyword arguments of `forward`; in half precision as wide as `inputs.width_step` asks, within the context.

        A model that names a pad reads its score at the rightmost token that is another: packed, the place is found here.
        """
        step, length = width_step(self), texts.tokens_BL.shape[1]
        if self.packing:
            tokens, slots_BL = packed_rows(texts.tokens_BL, texts.mask_BL, step, one_row=wants_one_row(self.model))
            named = self._own_pad()
            read_BL = texts.mask_BL if named is None else texts.mask_BL & (texts.tokens_BL != named)
            return {"tokens": tokens, "last_B": torch.where(read_BL, slots_BL, slots_BL[:, :1]).amax(1)}
        wide = max(length, min(-(-length // step) * step, self.context_tokens or length))
        tokens_BL, mask_BL = (torch.nn.functional.pad(each, (0, wide - length)) for each in (texts.tokens_BL, texts.mask_BL))
        return {"tokens": {"input_ids": tokens_BL, "attention_mask": mask_BL}}

    def blank(self) -> EncodedTexts:
        """One token that counts for nothing: what a rank forwards when it has no rows left."""
        return EncodedTexts.from_rows([[0]])

    def _score(self, logits_BC: Tensor) -> Tensor:
        logit_B = logits_BC[:, self.label]
        if self.transform == "logit":
            return logit_B
        if not self._independent:  # log p − log(1 − p) of a softmax, without leaving the log domain
            others = [index for index in range(logits_BC.shape[1]) if index != self.label]
            logit_B = logit_B - logits_BC[:, others].logsumexp(1)
        return logit_B if self.transform == "log_odds" else logit_B.sigmoid()

    def _try_packing(self) -> None:
        """See `refuse_leaks`: its own forward, with its own pooling, must give the scores that packed rows give."""
        if not isinstance(getattr(self._base, "score", None), nn.Module):
            raise refusal(self.model, "its scores do not come of a layer named `score` on the last token")
        named = self._own_pad()
        texts = EncodedTexts.from_rows([[1, 2, 1, 1, 2, 2, 1], [3, 4, 3, 4], [5, 6, 6 if named is None else named]])
        with lively_head(self._base.score, int(self.model.config.num_labels)):
            refuse_leaks(self, lambda: ClassifierModule.inputs(self, texts), "score_B", HEAD_ROUNDING)

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _own_pad(self) -> int | None:
        """The pad id that the model names, if it is a token at all (old checkpoints say −1)."""
        pad = self.model.config.get_text_config().pad_token_id
        return pad if pad is not None and 0 <= pad < self._vocabulary else None


def load_classifier(section: EngineSection, path: str, label: int | None = None, transform: Transform | None = None) -> ClassifierModule:
    """Loads a reward model, dropout off, in eval mode; in 4 bits where the section says so.

    Args:
        section: precision, quantisation, attention kernel, packing.
        path: Hugging Face folder (safetensors) or that of an adapter, or a hub name in the local cache.
        label, transform: see `ClassifierModule`.

    Raises:
        UserError: no such model; an architecture without a classifier; weights that the folder does not hold (a language model has
            no trained classification head: a random one would be a random reward); several outputs without label and transform; see
            `ClassifierModule`.
    """
    model = load_pretrained(AutoModelForSequenceClassification, section, path)
    return ClassifierModule(model, label, transform, packing=section.packing)


class _PadId:
    """Lets the model's configuration name a pad id for one call: decoder classifiers pool at the rightmost token that is not it."""

    def __init__(self, config: Any, pad: int) -> None:
        self._configs = [config] if config.get_text_config() is config else [config, config.get_text_config()]
        self._pad = pad

    def __enter__(self) -> None:
        self._before = [config.pad_token_id for config in self._configs]
        for config in self._configs:
            config.pad_token_id = self._pad

    def __exit__(self, *_: object) -> None:
        for config, pad in zip(self._configs, self._before, strict=True):
            config.pad_token_id = pad


def _absent_id(tokens_BL: Tensor, mask_BL: Tensor, vocabulary: int) -> int:
    """The highest id that does not occur in the rows; where all occur, one that ends no row, which pooling cannot tell from absent.

    Raises:
        ValueError: every id of the vocabulary ends some row.
    """
    last_B1 = (mask_BL.sum(1, keepdim=True) - 1).clamp(min=0)
    for content in (tokens_BL[mask_BL], tokens_BL.gather(1, last_B1).flatten()):
        absent = torch.ones(vocabulary, dtype=torch.bool, device=tokens_BL.device)
        absent[content] = False
        if bool(absent.any()):
            return int(absent.nonzero()[-1])
    raise ValueError(f"{len(tokens_BL)} rows end in all {vocabulary} ids of the vocabulary: lower microbatch_tokens")
