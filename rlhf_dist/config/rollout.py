"""`rollout`: how completions are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_dist.config.section import Section


class RolloutSection(Section):
    """Sampling. Without top-k and top-p (the default) the sampled distribution is exactly the trained one."""

    engine: Literal["native"] = Field("native", description="our decode loop over the Hugging Face model")
    prompts_per_step: int = Field(64, ge=1, description="prompts of one PPO iteration")
    samples_per_prompt: int = Field(1, ge=1, description="completions of each prompt (a group)")
    max_new_tokens: int = Field(128, ge=1, description="longest completion, in tokens")
    temperature: float = Field(1.0, gt=0, description="the same in sampling, old policy, policy and reference")
    top_k: int = Field(0, ge=0, description="0: off. Biases the ratio by the kept mass, which is logged")
    top_p: float = Field(1.0, gt=0, le=1, description="1: off. Biases the ratio by the kept mass, which is logged")
    stop_strings: list[str] = Field(default_factory=list, description="end a completion when its text contains one of these")
    slots: int = Field(64, ge=1, description="rows decoded side by side on each rank")
    shards_per_rank: int = Field(1, ge=1, description="pieces of a rank's prompts; scoring of one overlaps generation of the next")
