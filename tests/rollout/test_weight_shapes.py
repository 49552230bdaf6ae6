"""Shapes from headers against the export of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from rlhf_dist.config.errors import UserError
from rlhf_dist.models.lora import named_weights
from rlhf_dist.rollout.weight_shapes import weight_shapes


@pytest.mark.parametrize("tie", [False, True])
def test_shapes_of_a_checkpoint_are_the_names_of_its_export(tie: bool, build: Callable[..., Any], tmp_path: Path) -> None:
    model = build(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=tie
        )
    )
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert weight_shapes(str(tmp_path)) == {name: tuple(weight().shape) for name, _, weight in named_weights(model)}


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="safetensors"):
        weight_shapes(str(tmp_path))
