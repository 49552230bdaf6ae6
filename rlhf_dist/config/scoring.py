"""Settings of `rlhf-dist score`, `compare` and `report`: how a saved reward model is run, and on which rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_dist.config.engines import Dtype
from rlhf_dist.config.section import Section


class ScoringModelSection(Section):
    """How the model is run: in this process, without DeepSpeed."""

    dtype: Dtype = Field("fp32", description="compute precision")
    device: str = Field("auto", description="cpu, cuda, cuda:1 …; auto: the first GPU, the CPU where there is none")
    quantize: Literal["none", "nf4"] = Field("none", description="nf4: hold the linear layers in 4 bits (bitsandbytes)")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernel of transformers")
    microbatch_tokens: int = Field(8192, ge=1, description="most tokens in one forward, padding included; a longer text travels alone")
    packing: bool = Field(
        False,
        description="several texts in one row of a forward, none of which sees another; microbatch_tokens then counts no padding. A model "
        "that does not read its score at the last token, or in which they would see each other, is refused",
    )
    trust_remote_code: bool = Field(False, description="run code shipped inside the model folder")
    label: int | None = Field(None, ge=0, description="which output to read; needed when the model has several")
    transform: Literal["logit", "probability", "log_odds"] | None = Field(
        None, description="what to make of it; needed when the model has several"
    )


class ScoringRowsSection(Section):
    """What happens to rows that do not fit."""

    max_tokens: int | None = Field(None, ge=2, description="longest text, prompt and answer together; default: the model's context")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="a longer text: stop, leave the row out and count it, or shorten its prompt at the front and count it"
    )
    faults: Literal["error", "drop"] = Field(
        "error", description="a row that cannot be used: stop with file, line and reason, or leave it out and count it"
    )


class ScoringConfig(Section):
    """All settings, each with a default: `model.dtype=bf16 data.overlong=truncate` on the command line."""

    model: ScoringModelSection = Field(default_factory=ScoringModelSection)
    data: ScoringRowsSection = Field(default_factory=ScoringRowsSection)
