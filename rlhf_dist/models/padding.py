"""The pad token of a classifier: named in its configuration, with a row of zeros in the embeddings that no text reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def name_pad(config: Any, pad: int) -> None:
    """Sets the pad id of a configuration, in place, and counts its token among those that the model knows."""
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = pad
    text.vocab_size = max(text.vocab_size, pad + 1)


def grow_embeddings(model: Any, rows: int) -> None:
    """Gives a model's embeddings rows of zeros until they are as many as wanted; more than that stay."""
    before = embedding_rows(model)
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[before:] = 0


def embedding_rows(model: Any) -> int:
    """Tokens that a model, adapted or not, has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def with_rows(tensor: Tensor, rows: int, dim: int) -> Tensor:
    """A tensor with zeros added at the end of a dimension, until that is as long as wanted."""
    missing = rows - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = [missing if number == dim else size for number, size in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
