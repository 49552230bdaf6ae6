"""Preferences without a person: a model continues openings, VADER reads what it wrote, and the more cheerful one is the chosen one.

    python configs/recipes/sentiment/make_pairs.py ../shared/models/stories260K     # writes runs/sentiment/pairs/{train,eval}.jsonl

Of the samples of an opening the best is paired with the worst, the second best with the second worst, and so on. Which openings are held
out says a hash of their text, the same that the PPO recipe goes by. Needs `pip install vaderSentiment`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.data.prompts import held_out, stable_hash
from rlhf_dist.models.loading import load_causal_lm, load_tokenizer, stop_tokens
from rlhf_dist.models.quiet import quiet_libraries
from rlhf_dist.rollout.native import Completion, NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams

HERE = Path(__file__).resolve().parent
OPENINGS = HERE / "openings.jsonl"
OUTPUT = HERE.parents[2] / "runs" / "sentiment" / "pairs"

HELD_OUT = 0.2  # as data.eval_fraction of ppo.yaml
NEW_TOKENS = 48
SLOTS = 64


def openings() -> tuple[list[str], list[str]]:
    """The recipe's openings: those to learn from, and those held out."""
    texts = [json.loads(line)["prompt"] for line in OPENINGS.read_text(encoding="utf-8").splitlines()]
    return [text for text in texts if not held_out(text, HELD_OUT)], [text for text in texts if held_out(text, HELD_OUT)]


def sample(model: str, prompts: Sequence[str], count: int, key: SamplingKey) -> list[list[str]]:
    """`count` continuations of every prompt at temperature 1, as the text goes on: opening + continuation is the story."""
    tokenizer = load_tokenizer(model)
    engine = NativeEngine(load_causal_lm(EngineSection(), model), slots=SLOTS)
    encoded = [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    rows = [
        RolloutRow(tokens, stable_hash(prompt), number) for prompt, tokens in zip(prompts, encoded, strict=True) for number in range(count)
    ]
    params = SamplingParams(NEW_TOKENS, stop_tokens=stop_tokens(model, tokenizer))
    completions, _ = engine.generate(rows, params, key)
    texts = [_text(tokenizer, row, completion) for row, completion in zip(rows, completions, strict=True)]
    return [texts[at : at + count] for at in range(0, len(texts), count)]


def cheerfulness(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each text, from -1 to 1."""
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text.strip())["compound"] for text in texts]


def best_over_worst(prompt: str, texts: Sequence[str], pairs: int) -> list[dict[str, Any]]:
    """At most `pairs` rows: best over worst, second best over second worst …; equal scores make none."""
    ranked = sorted(zip(cheerfulness(texts), texts, strict=True), reverse=True)
    matched = zip(ranked[:pairs], reversed(ranked[len(ranked) // 2 :]), strict=False)
    return [
        {"prompt": prompt, "chosen": better, "rejected": worse, "margin": round(high - low, 4)}
        for (high, better), (low, worse) in matched
        if high > low and better.strip() and worse.strip()
    ]


def _text(tokenizer: Any, row: RolloutRow, completion: Completion) -> str:
    """Decoded behind its opening: SentencePiece drops the space in front of a text that it decodes alone."""
    before = str(tokenizer.decode(row.prompt_tokens, skip_special_tokens=True))
    return str(tokenizer.decode([*row.prompt_tokens, *completion.tokens], skip_special_tokens=True))[len(before) :]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Samples and ranks the pairs of the sentiment recipe.")
    parser.add_argument("model", help="Hugging Face folder of a causal LM")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write (default: runs/sentiment/pairs)")
    parser.add_argument("--samples", type=int, default=16, help="continuations of an opening")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of an opening, half the samples at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    began = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, prompts in zip(("train", "eval"), openings(), strict=True):
        sampled = sample(options.model, prompts, options.samples, SamplingKey(options.seed, name, 0))
        rows = [row for prompt, texts in zip(prompts, sampled, strict=True) for row in best_over_worst(prompt, texts, options.pairs)]
        (options.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{options.output / name}.jsonl: {len(rows)} pairs of {len(prompts)} openings")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
