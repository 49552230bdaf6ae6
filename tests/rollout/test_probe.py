"""The probe passes models that decode correctly and stops those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.rollout.probe import check_decoding, decoding_gap
from rlhf_dist.rollout.traits import decoding, read_traits


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_right_model_passes(build: Callable[..., Any], llama: Any, dtype: torch.dtype, allowed: float) -> None:
    model = build(llama.config).to(dtype)
    with decoding(model):
        check_decoding(model, read_traits(model))
        assert decoding_gap(model, read_traits(model)) < allowed


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_a_model_that_ignores_what_it_is_told_is_stopped(
    build: Callable[..., Any], llama: Any, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(llama.config)
    traits, inner = read_traits(model), model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: inner(*args, **{**kwargs, ignored: None}))
    with decoding(model), pytest.raises(UserError, match="differs from its own forward"):
        check_decoding(model, traits)
