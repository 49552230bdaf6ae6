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
    restarts: int = Field(
        3, ge=0, description="recoveries from dead or stuck processes since the run last got further than before (Ray); then it stops"
    )
    heartbeat_s: float = Field(10.0, gt=0, description="seconds between two looks at whether a process is there (Ray)")
    heartbeat_timeout_s: float = Field(120.0, gt=0, description="a process that gives no sign of life for so long is ended (Ray)")


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
    """All that a run needs to go on exactly (`run.resume=auto`). `rlhf-dist export` makes Hugging Face folders of it."""

    every: int = Field(10, ge=0, description="steps between checkpoints; 0: only when the run is asked to stop")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    asynchronous: bool = Field(True, description="train on while files are written, from a copy in host memory; false: wait for them")
