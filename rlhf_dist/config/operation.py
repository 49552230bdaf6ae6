"""`placement`, `evaluation`, `checkpoint`: where engines live, how the run is watched, what it keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_dist.config.section import Section


class PlacementSection(Section):
    """Who starts the processes."""

    launcher: Literal["ray", "spmd"] = Field(
        "ray", description="ray: an actor a rank; spmd: the processes of the deepspeed launcher, or one plain process"
    )
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field("PACK", description="Ray placement strategy of each group")
    start_timeout_s: float = Field(300.0, gt=0, description="longest wait for actors to be placed and to load their models")
    call_timeout_s: float = Field(3600.0, gt=0, description="longest wait for one phase")
    threads_per_rank: int = Field(1, ge=1, description="CPU threads of each rank (OMP_NUM_THREADS)")


class PPOPlacementSection(PlacementSection):
    """Who starts the processes, and whether their engines share devices by turns."""

    offload: Literal["none", "idle"] = Field(
        "none",
        description="idle: engines take turns; idle weights, gradients and optimiser state leave their device, for pinned host memory from "
        "a GPU, for a temporary file from a CPU. Peak memory is that of the largest phase, not the sum. Costs the copies (offload/seconds) "
        "and all overlap of engines; changes no result",
    )


class EvaluationSection(Section):
    """Held-out prompts, sampled with a stream of their own and one fixed seed, so that before and after are paired."""

    every: int = Field(10, ge=0, description="steps between evaluations; 0: only before and after (when there are held-out prompts)")
    samples_per_prompt: int = Field(1, ge=1, description="completions of each held-out prompt")
    max_prompts: int | None = Field(None, ge=1, description="use only the first n held-out prompts")


class CheckpointSection(Section):
    """Weights-only Hugging Face folders."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only the final export")
    keep: int = Field(2, ge=1, description="checkpoints kept besides the final export")
