"""The sampler's copy holds what was sent, or the sync fails."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.weights import SyncInfo
from rlhf_dist.models.checksum import checksum
from rlhf_dist.workers.weight_sync import CopyTarget, Count, adopted, copy_weights, weights_of


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
    held = copy_weights(weights_of(target), buckets(source, size), 1)
    assert held.checksum == checksum(weights_of(source).items())
    assert held.bytes == sum(weight.nbytes for weight in weights_of(source).values())
    assert held.buckets == -(-len(weights_of(source)) // size)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))
    tokens = torch.arange(5)[None]
    assert torch.equal(source(tokens).logits, target(tokens).logits)


def test_a_weight_of_another_name_is_named() -> None:
    with pytest.raises(UserError, match=r"no weight called model\.layers\.9\.weight") as caught:
        copy_weights(weights_of(llama()), [{"model.layers.9.weight": torch.zeros(2)}], 1)
    assert caught.value.where == "weight sync"


def test_a_weight_that_did_not_come_fails_the_sync() -> None:
    """It would stay at the version before, and every sample would be off-policy unseen."""
    sent = [{name: weight for name, weight in bucket.items() if name != "model.norm.weight"} for bucket in buckets(llama(0))]
    target = llama(1)
    with pytest.raises(UserError, match=r"lacks 1 of \d+ weights for version 7, model\.norm\.weight first"):
        copy_weights(weights_of(target), sent, 7)


def test_a_copy_in_another_precision_fails_the_sync() -> None:
    with pytest.raises(UserError, match="does not hold"):
        copy_weights(weights_of(llama(1).bfloat16()), buckets(llama(0)), 1)


def test_a_weight_of_another_shape_is_named() -> None:
    with pytest.raises(UserError, match=r"holds model\.norm\.weight as \[8\], what came is \[9\]"):
        copy_weights(weights_of(llama()), [{"model.norm.weight": torch.zeros(9)}], 1)


def test_a_target_counts_each_update_on_its_own() -> None:
    """A weight that came last time counts for nothing now."""
    source, target = llama(0), CopyTarget(weights_of(llama(1)))
    for bucket in buckets(source):
        target.load_bucket(bucket)
    assert target.finish_sync(1) == checksum(weights_of(source).items())
    with pytest.raises(UserError, match=r"lacks \d+ of \d+ weights for version 2"):
        target.finish_sync(2)


def test_what_the_trainer_counts_must_be_what_the_target_holds() -> None:
    target = CopyTarget(weights_of(llama(1)))
    for bucket in buckets(llama(0)):
        target.load_bucket(bucket)
    with pytest.raises(UserError, match="does not hold what the trainer sent"):
        adopted(target, 1, SyncInfo(checksum(weights_of(llama(2)).items()), 1, 1))


def test_a_count_does_not_depend_on_the_cut() -> None:
    infos = []
    for size in (1, 4):
        count = Count()
        for bucket in buckets(llama(), size):
            count.add(bucket)
        infos.append(count.info())
    assert infos[0].checksum == infos[1].checksum and infos[0].bytes == infos[1].bytes and infos[0].buckets > infos[1].buckets
