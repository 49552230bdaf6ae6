"""How cheerful are the stories of one or more models? Mean VADER sentiment of samples of the held-out openings, with 95 % intervals.

    python configs/recipes/sentiment/measure.py ../shared/models/stories260K runs/sentiment/dpo/export/model

All models draw with the same random numbers, so the difference to the first is paired. Needs `pip install vaderSentiment`.
"""

from __future__ import annotations

import argparse

import torch
from make_pairs import cheerfulness, openings, sample

from rlhf_dist.evaluation.interval import MeanInterval, clustered_mean
from rlhf_dist.models.quiet import quiet_libraries
from rlhf_dist.rollout.native import SamplingKey


def measure(models: list[str], count: int, seed: int, prompts: list[str]) -> list[tuple[MeanInterval, MeanInterval]]:
    """Of each model: the mean sentiment, and the mean difference to the first model, over `count` samples of every prompt."""
    clusters = [prompt for prompt in prompts for _ in range(count)]
    scores = []
    for model in models:
        sampled = sample(model, prompts, count, SamplingKey(seed, "eval", 1))  # step 1: not the samples that pairs are made of
        scores.append(cheerfulness([text for texts in sampled for text in texts]))
    differences = [[after - before for after, before in zip(each, scores[0], strict=True)] for each in scores]
    return [(clustered_mean(each, clusters), clustered_mean(gain, clusters)) for each, gain in zip(scores, differences, strict=True)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures the sentiment of the stories that models tell.")
    parser.add_argument("models", nargs="+", help="Hugging Face folders; differences are to the first")
    parser.add_argument("--samples", type=int, default=16, help="continuations of each held-out opening")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    for model, (mean, gain) in zip(options.models, measure(options.models, options.samples, options.seed, openings()[1]), strict=True):
        line = f"{model}: {mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
        print(line if model == options.models[0] else f"{line}, difference {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")


if __name__ == "__main__":
    main()
