"""A saved reward model for people: text in, score out.

>>> model = RewardModel.load("runs/reward/export/model")
>>> model.score(["Name a fruit."], [" An apple."])
[1.37]
>>> model.compare("Name a fruit.", " An apple.", " A hammer.").probability_a
0.91
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlhf_dist.config.engines import Dtype, EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.scoring import ScoringConfig, ScoringModelSection, ScoringRowsSection
from rlhf_dist.data.answers import AnswersEncoder, Overlong, fitted
from rlhf_dist.data.layouts import Prompt
from rlhf_dist.data.microbatches import token_budget_cuts
from rlhf_dist.data.token_rows import TokenRow
from rlhf_dist.models.classifier import ClassifierModule, EncodedTexts, load_classifier
from rlhf_dist.models.inputs import to_device
from rlhf_dist.models.loading import load_tokenizer, stop_tokens


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt. probability_a: that a is the better one, σ(score_a − score_b), as Bradley and Terry (1952) have it."""

    probability_a: float
    score_a: float
    score_b: float

    @classmethod
    def of(cls, score_a: float, score_b: float) -> Comparison:
        """From two scores."""
        return cls(preference(score_a, score_b), score_a, score_b)


@dataclass(frozen=True)
class Limits:
    """Longest text in tokens (None: no limit), and what happens to a longer one: see `data.answers.fitted`."""

    max_tokens: int | None
    overlong: Overlong


class RewardModel:
    """Scores answers with a sequence classifier in this process.

    Texts become tokens as in training (`data.answers.AnswersEncoder`): prompt and answer together, the stop token at the end; a chat
    through the tokenizer's template, with the answer as the assistant's turn.

    Args:
        module: on its device, in eval mode.
        encoder: of the model's tokenizer.
        limits: of a text.
        microbatch_tokens: tokens of one forward, padding included unless the module packs; a longer text travels alone.
    """

    def __init__(self, module: ClassifierModule, encoder: AnswersEncoder, limits: Limits, microbatch_tokens: int = 8192) -> None:
        self._module, self.encoder, self.limits, self._budget = module, encoder, limits, microbatch_tokens

    @classmethod
    def load(
        cls,
        folder: str,
        dtype: Dtype = "fp32",
        device: str = "cpu",
        max_tokens: int | None = None,
        overlong: Literal["error", "truncate"] = "error",
    ) -> RewardModel:
        """Loads a reward model with one output; `from_config` has all settings.

        Args:
            folder: Hugging Face folder of a sequence classifier with its tokenizer, or hub name in the local cache.
            dtype: fp32, bf16 or fp16. device: cpu, cuda …, or auto.
            max_tokens: longest text; by default the model's context. overlong: refuse a longer one, or shorten its prompt at the front.

        Raises:
            UserError: as `from_config`.
        """
        model = ScoringModelSection(dtype=dtype, device=device)
        return cls.from_config(folder, ScoringConfig(model=model, data=ScoringRowsSection(max_tokens=max_tokens, overlong=overlong)))

    @classmethod
    def from_config(cls, folder: str, config: ScoringConfig) -> RewardModel:
        """Loads any reward model.

        Raises:
            UserError: no such model or tokenizer, no trained classification head, several outputs without label and transform, a limit
                above the model's context, a device that is not there, packing where the model cannot be packed.
        """
        section, device = config.model, _device(config.model.device)
        engine = EngineSection(
            dtype=section.dtype,
            quantize=section.quantize,
            attention=section.attention,
            packing=section.packing,
            trust_remote_code=section.trust_remote_code,
        )
        tokenizer = load_tokenizer(folder, trust_remote_code=section.trust_remote_code)
        encoder = AnswersEncoder(tokenizer, stop_tokens(folder, tokenizer, trust_remote_code=section.trust_remote_code))
        module = load_classifier(engine, folder, section.label, section.transform).to(device)
        return cls(
            module,
            encoder,
            Limits(module.input_limit(config.data.max_tokens), config.data.overlong),
            microbatch_tokens=section.microbatch_tokens,
        )

    def score(self, prompts: Sequence[str | Sequence[Mapping[str, Any]]], completions: Sequence[str]) -> list[float]:
        """One score a completion.

        Args:
            prompts: texts, or chats as lists of `{"role", "content"}` that end with the user's turn.
            completions: the answers, as many.

        Raises:
            ValueError: numbers that differ.
            UserError: a text that is too long (or whose answer alone is, under `truncate`), a chat without a chat template, a score that is
                not finite.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
        pairs = enumerate(zip(prompts, completions, strict=True))
        return self.score_rows([self._kept(prompt, [text], f"text {number + 1}")[0] for number, (prompt, text) in pairs])

    def compare(self, prompt: str | Sequence[Mapping[str, Any]], a: str, b: str) -> Comparison:
        """Which of two answers is the better one, and how surely. Where the prompt must be shortened, it is for both alike.

        Raises:
            UserError: as `score`.
        """
        return Comparison.of(*self.score_rows(self._kept(prompt, [a, b], "comparison")))

    def encode(self, prompt: Prompt, answers: Sequence[str], where: str) -> tuple[tuple[TokenRow, ...], str]:
        """The answers to one prompt as tokens within the limit, and what became of them: see `data.answers.fitted`.

        Raises:
            UserError: too long, where that is an error; a chat without a chat template; an answer without any token.
        """
        rows = [self.encoder.encode(prompt, answer, where=where) for answer in answers]
        if not all(len(row) for row in rows):
            raise UserError("there is no text to score", where=where, fix="give a prompt or a completion")
        if self.limits.max_tokens is None:
            return tuple(rows), ""
        return fitted(rows, self.limits.max_tokens, self.limits.overlong, where, self.encoder.bos)

    @torch.inference_mode()
    def score_rows(self, rows: Sequence[TokenRow]) -> list[float]:
        """Scores of encoded texts, in order.

        Raises:
            UserError: scores that are not finite.
        """
        scores = [math.nan] * len(rows)
        device = next(self._module.parameters()).device
        for cut in token_budget_cuts([len(row) for row in rows], self._budget, packed=self._module.packing):
            inputs = self._module.inputs(EncodedTexts.from_rows([rows[number].tokens.tolist() for number in cut]))
            output = self._module(**to_device(inputs, device))
            for number, score in zip(cut, output["score_B"].tolist(), strict=True):
                scores[number] = score
        faulty = [score for score in scores if not math.isfinite(score)]
        if faulty:
            raise UserError(
                f"{len(faulty)} of {len(scores)} scores are not finite ({faulty[0]})",
                where="reward model",
                fix="the weights may be damaged, or fp16 too narrow for them: try fp32 or bf16",
            )
        return scores

    def _kept(self, prompt: str | Sequence[Mapping[str, Any]], answers: Sequence[str], where: str) -> tuple[TokenRow, ...]:
        turns: Prompt = prompt if isinstance(prompt, str) else tuple(dict(message) for message in prompt)
        rows, fate = self.encode(turns, answers, where)
        if not rows:
            raise UserError(f"the text has no score ({fate})", where=where, fix="shorten it, or raise data.max_tokens")
        return rows


def preference(score_a: float, score_b: float) -> float:
    """σ(score_a − score_b) without overflow."""
    difference = score_a - score_b
    return 1 / (1 + math.exp(-difference)) if difference >= 0 else math.exp(difference) / (1 + math.exp(difference))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device called {name!r}", where="model.device", fix="write cpu, cuda, cuda:1 … or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise UserError(f"device {name} is not there ({seen} GPUs are seen)", where="model.device", fix="write cpu, or auto")
    return device
