"""`policy`, `reference`, `value`: the model an engine holds, its precision, its DeepSpeed file, its ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.config.optim import OptimSection
from rlhf_dist.config.section import Section

Dtype = Literal["fp32", "bf16", "fp16"]


class LoraSection(Section):
    """Low-rank adapters (peft). The reference is then the policy with its adapter off: no reference engine is started."""

    r: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="scale numerator (scale = alpha / r)")
    target_modules: list[str] | Literal["all-linear"] = Field("all-linear", description="module names to adapt")


class EngineSection(Section):
    """What all engines have."""

    dtype: Dtype = Field("fp32", description="compute precision; with bf16 and fp16 the master weights are fp32")
    deepspeed: str = Field("", description="raw DeepSpeed JSON; empty means ZeRO 0")
    ranks: int = Field(1, ge=1, description="processes the engine is sharded over (the deepspeed launcher decides itself)")
    cpus_per_rank: float = Field(1.0, gt=0, description="CPUs Ray reserves for each rank")
    gpus_per_rank: float = Field(0.0, ge=0, description="GPUs Ray reserves for each rank; a fraction colocates engines")
    microbatch_tokens: int = Field(8192, ge=1, description="most tokens in one forward, padding included; a longer sequence travels alone")
    packing: bool = Field(
        False,
        description="several sequences in one row of a forward, none of which sees another; microbatch_tokens then counts no padding. "
        "Large microbatches of ragged rows gain (on a CPU 3 times as fast at 4096 tokens); small ones, of rows of like length, hardly. "
        "A model in which they would see each other is refused",
    )
    trust_remote_code: bool = Field(False, description="run code shipped inside the model folder")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernel of transformers")
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: hold the linear layers in 4 bits (bitsandbytes); what is trained then needs `lora` (QLoRA)"
    )


class TrainedSection(EngineSection):
    """What a trained engine has besides."""

    lora: LoraSection | None = Field(None, description="train adapters instead of all weights")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    optim: OptimSection = Field(default_factory=OptimSection)

    @model_validator(mode="after")
    def _four_bits_are_frozen(self) -> TrainedSection:
        if self.quantize != "none" and self.lora is None:
            raise ValueError("quantize freezes the linear layers, so adapters must learn: set lora, for example lora.r=16")
        return self


class PolicySection(TrainedSection):
    """The model being aligned."""

    model: str = Field(description="Hugging Face folder (or cached hub name) of a causal LM, or of a peft adapter for one")


class ReferenceSection(EngineSection):
    """The frozen model that KL is measured to."""

    model: str = Field("", description="empty: the initial policy")


class ValueSection(TrainedSection):
    """The critic, on a backbone of its own. Started only by the `gae` estimator."""

    model: str = Field("", description="causal LM or sequence classifier; empty: the initial policy")
    head_init: Literal["zero", "keep"] = Field("zero", description="start the head at zero, or keep a classifier's head")
    optim: OptimSection = Field(default_factory=lambda: OptimSection(lr=1e-5))
    warmup_steps: int = Field(0, ge=0, description="PPO steps at the start that train the value model alone")
