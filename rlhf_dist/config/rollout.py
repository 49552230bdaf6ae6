"""`rollout`: how completions are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.config.section import Section

OF_RANKS = ("cpus_per_rank", "gpus_per_rank", "python", "weight_sync")
"""What has a meaning only with ranks of its own."""

VLLM_TEMPERATURES = 0.01, 2.0
"""vLLM raises a lower temperature to the first without a word, and refuses one above the second."""


class RolloutSection(Section):
    """Sampling. Without top-k and top-p (the default) the sampled distribution is exactly the trained one."""

    engine: Literal["native", "vllm"] = Field(
        "native", description="native: our decode loop over the Hugging Face model; vllm: needs ranks of its own, and mostly `python`"
    )
    ranks: int = Field(0, ge=0, description="Ray actors that sample and do nothing else; 0: the policy's own processes sample")
    cpus_per_rank: float = Field(1.0, gt=0, description="CPUs Ray reserves for each of those ranks")
    gpus_per_rank: float = Field(0.0, ge=0, description="GPUs Ray reserves for each of those ranks; a fraction shares one")
    python: str = Field(
        "",
        description="interpreter of another environment for those ranks, the same path on every node; empty: the one that runs the policy",
    )
    weight_sync: Literal["auto", "ipc", "broadcast", "object_store"] = Field(
        "auto",
        description="how weights reach those ranks. ipc: memory of one node (or of one GPU) that both map; broadcast: a process group of "
        "their own (gloo, NCCL); object_store: Ray's; auto: the first of them that the placement allows",
    )
    prompts_per_step: int = Field(64, ge=1, description="prompts of one PPO iteration")
    samples_per_prompt: int = Field(1, ge=1, description="completions of each prompt (a group)")
    max_new_tokens: int = Field(128, ge=1, description="longest completion, in tokens")
    temperature: float = Field(1.0, gt=0, description="the same in sampling, old policy, policy and reference")
    top_k: int = Field(0, ge=0, description="0: off. Biases the ratio by the kept mass, which is logged")
    top_p: float = Field(1.0, gt=0, le=1, description="1: off. Biases the ratio by the kept mass, which is logged")
    stop_strings: list[str] = Field(default_factory=list, description="end a completion when its text contains one of these")
    slots: int = Field(64, ge=1, description="rows decoded side by side on each rank")
    shards_per_rank: int = Field(1, ge=1, description="pieces of a rank's prompts; scoring of one overlaps generation of the next")
    max_staleness: int = Field(
        0,
        ge=0,
        description="k: a step trains on samples of the policy of k steps before, so that sampling and training overlap; 0: the newest",
    )

    @model_validator(mode="after")
    def _only_ranks_of_their_own_are_placed(self) -> RolloutSection:
        if self.ranks == 0:
            if self.engine == "vllm":
                raise ValueError("engine: vllm samples in processes of its own: set rollout.ranks to 1 or more")
            unused = [name for name in OF_RANKS if getattr(self, name) != type(self).model_fields[name].default]
            if unused:
                raise ValueError(f"{', '.join(unused)} would change nothing, because the policy's own processes sample: set rollout.ranks")
        if self.engine == "vllm" and (self.top_k or self.top_p < 1):
            raise ValueError("engine: vllm gives no log-probs of the unfiltered distribution beside top_k and top_p: switch them off")
        coldest, hottest = VLLM_TEMPERATURES
        if self.engine == "vllm" and not coldest <= self.temperature <= hottest:
            raise ValueError(f"engine: vllm takes temperatures from {coldest} to {hottest}")
        return self
