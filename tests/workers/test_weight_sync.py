"""The sampler's copy holds what was sent, or the sync fails."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_dist.config.errors import UserError
from rlhf_dist.models.checksum import checksum
from rlhf_dist.workers.weight_sync import copy_weights, weights_of


def llama(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **options))


def buckets(model: LlamaForCausalLM, size: int = 3) -> Iterator[dict[str, Tensor]]:
    items = list(weights_of(model).items())
    for start in range(0, len(items), size):
        yield {name: weight.clone() for name, weight in items[start : start + size]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_copy_holds_what_was_sent_bit_for_bit(tied, size) -> None:
    source, target = llama(0, tie_word_embeddings=tied), llama(1, tie_word_embeddings=tied)
    for model, value in ((source, 2.0), (target, 3.0)):
        model.register_buffer("scale", torch.tensor([value]))
    held = copy_weights(weights_of(target), buckets(source, size))
    assert held == checksum(weights_of(source).items())
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))
    tokens = torch.arange(5)[None]
    assert torch.equal(source(tokens).logits, target(tokens).logits)


def test_a_weight_of_another_name_is_named() -> None:
    with pytest.raises(UserError, match=r"no weight called model\.layers\.9\.weight") as caught:
        copy_weights(weights_of(llama()), [{"model.layers.9.weight": torch.zeros(2)}])
    assert caught.value.where == "weight sync"


def test_a_weight_that_did_not_come_fails_the_sync() -> None:
    """It would stay at the version before, and every sample would be off-policy unseen."""
    sent = [{name: weight for name, weight in bucket.items() if name != "model.norm.weight"} for bucket in buckets(llama(0))]
    target = llama(1)
    with pytest.raises(UserError, match="does not hold what the trainer sent"):
        copy_weights(weights_of(target), sent)


def test_a_copy_in_another_precision_fails_the_sync() -> None:
    with pytest.raises(UserError, match="does not hold"):
        copy_weights(weights_of(llama(1).bfloat16()), buckets(llama(0)))
