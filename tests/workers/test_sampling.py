"""From prompts to a shard: sample numbers that no shard cut changes, stop strings cut from the text, and the layout of the batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.config.rollout import RolloutSection
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.contracts.roles import GenerateRequest
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.data.prompts import PromptRecord
from rlhf_dist.rollout.native import Completion
from rlhf_dist.workers.sampling import Sampler, decoder, native_sampler


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def sampler_of(tiny_model, tokenizer) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()

    def make(**options: Any) -> Sampler:
        return native_sampler(model, tokenizer, RolloutSection(**({"max_new_tokens": 8, "slots": 4} | options)), [2], seed=5)

    return make


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[PromptRecord]:
    texts = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10", "w11"]
    return [PromptRecord(100 + n, text, tuple(tokenizer(text)["input_ids"]), {"answer": f"a{n}"}, "f", n) for n, text in enumerate(texts)]


def request(count: int, start: int = 0, samples: int = 2, **options: Any) -> GenerateRequest:
    return GenerateRequest(
        **({"stream": "train", "step": 3, "step_start": 0, "version": 7} | options), start=start, count=count, samples_per_prompt=samples
    )


def by_sample(answer: Any) -> dict[tuple[int, int], list[int]]:
    """Response tokens by prompt id and sample number."""
    batch = answer.payload
    rows = [tokens[mask].tolist() for tokens, mask in zip(batch.response_tokens_BT, batch.response_mask_BT, strict=True)]
    keys = list(zip(batch.prompt_id_B.tolist(), batch.sample_index_B.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, rows, strict=True))


def test_a_shard_holds_its_groups_in_order_in_the_layout_of_the_contract(sampler_of, prompts, tokenizer) -> None:
    answer = sampler_of().sample(request(5), [], prompts)
    batch, info = answer.payload, answer.info
    assert batch.prompt_id_B.tolist() == [100, 100, 101, 101, 102, 102, 103, 103, 104, 104]
    assert batch.sample_index_B.tolist() == [0, 1] * 5 and batch.policy_version_B.tolist() == [7] * 10
    assert batch.prompts[:3] == ("w1 w2 w3", "w1 w2 w3", "w4") and batch.columns == {"answer": tuple(f"a{n // 2}" for n in range(10))}
    for row, record in enumerate(record for record in prompts for _ in range(2)):
        assert batch.prompt_tokens_BP[row][batch.prompt_mask_BP[row]].tolist() == list(record.tokens)
        length = int(batch.response_lengths_B[row])
        assert batch.response_mask_BT[row].tolist() == [True] * length + [False] * (batch.response_mask_BT.shape[1] - length)
        response = batch.response_tokens_BT[row, :length].tolist()
        stopped = batch.stop_reason_B[row] == StopReason.STOP_TOKEN
        assert (response[-1] == 2) == stopped and 2 not in response[:-1] and (stopped or length == 8)
        assert batch.completions[row] == tokenizer.decode(response, skip_special_tokens=True)
    assert not batch.prompt_mask_BP[:, 0].all() and batch.prompt_mask_BP[:, -1].all()  # padded on the left
    mask = batch.response_mask_BT
    assert (
        torch.equal(mask, batch.response_attention_BT)
        and (batch.rollout_logprobs_BT[mask] < 0).all()
        and not batch.rollout_logprobs_BT[~mask].any()
    )
    assert not batch.response_tokens_BT[~mask].any() and not batch.prompt_tokens_BP[~batch.prompt_mask_BP].any()
    assert info.prompt_ids == tuple(batch.prompt_id_B.tolist()) and info.sample_indices == (0, 1) * 5 and info.versions == (7,) * 10
    assert info.prompt_lengths == tuple(len(r.tokens) for r in prompts for _ in range(2))
    assert info.response_lengths == tuple(batch.response_lengths_B.tolist()) and info.stop_reasons == tuple(batch.stop_reason_B.tolist())
    assert info.seconds > 0 and "rollout/rows_per_step" in info.tally.sums


@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 2, 1], [1] * 5])
def test_a_prompt_that_comes_again_gets_further_sample_numbers_wherever_shards_are_cut(cuts, sampler_of, prompts) -> None:
    stream = [prompts[0], prompts[1], prompts[0], prompts[0], prompts[1]]
    whole = by_sample(sampler_of().sample(request(5), [], stream))
    assert set(whole) == {(100, n) for n in range(6)} | {(101, n) for n in range(4)}
    assert len({tuple(tokens) for key, tokens in whole.items() if key[0] == 100}) > 1
    parts: dict[tuple[int, int], list[int]] = {}
    start = 0
    for count in cuts:
        parts |= by_sample(sampler_of().sample(request(count, start), stream[:start], stream[start : start + count]))
        start += count
    assert parts == whole


def test_samples_depend_on_step_and_stream_and_evaluations_are_paired(sampler_of, prompts) -> None:
    def tokens(**options: Any) -> dict[tuple[int, int], list[int]]:
        return by_sample(sampler_of().sample(request(5, **options), [], prompts))

    assert tokens(step=3) == tokens(step=3) != tokens(step=4)
    assert tokens(stream="eval", step=3) == tokens(stream="eval", step=4) != tokens(step=0)


def test_a_request_may_shorten_completions_and_never_lengthen_them(sampler_of, prompts) -> None:
    whole = by_sample(sampler_of().sample(request(5), [], prompts))
    short = by_sample(sampler_of().sample(request(5, max_new_tokens=3), [], prompts))
    assert short == {key: tokens[:3] for key, tokens in whole.items()}
    assert by_sample(sampler_of().sample(request(5, max_new_tokens=99), [], prompts)) == whole


def test_no_prompts_give_an_empty_shard(sampler_of) -> None:
    answer = sampler_of().sample(request(0), [], [])
    assert (
        len(answer.payload) == 0 and answer.payload.prompts == () and answer.info.response_lengths == () and answer.info.tally.means() == {}
    )


def test_rows_without_a_column_hold_none_in_it(sampler_of, prompts) -> None:
    bare = PromptRecord(7, "w1", (1, 5), {"other": 1}, "f", 0)
    batch = sampler_of().sample(request(2, samples=1), [], [prompts[0], bare]).payload
    assert batch.columns == {"answer": ("a0", None), "other": (None, 1)}


def test_a_stop_string_ends_the_completion_and_is_cut_from_its_text(sampler_of, prompts, tokenizer) -> None:
    """The tokens keep it: they are what the policy chose."""
    free = sampler_of().sample(request(5), [], prompts).payload
    row = int(free.response_lengths_B.argmax())
    words = free.completions[row].split()
    stop = words[2]
    batch = sampler_of(stop_strings=["never", stop]).sample(request(5), [], prompts).payload
    position = words.index(stop)
    assert batch.stop_reason_B[row] == StopReason.STOP_STRING and batch.response_lengths_B[row] == position + 1
    assert batch.completions[row].split() == words[:position] and stop not in batch.completions[row]
    assert tokenizer.decode(batch.response_tokens_BT[row, : position + 1].tolist()).split() == words[: position + 1]


class Silent:
    """An engine that nobody asks."""

    def generate(self, rows: Sequence[Any], params: Any, key: Any) -> Any:
        raise AssertionError("nothing is sampled here")


class Characters:
    """A tokenizer whose tokens are given pieces of text; 0 and 1 are special."""

    pieces = ("<|end|>", "<|pad|>", "Yes", ".\n", "\nUser", ": hi", " no")

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[token] for token in tokens if not (skip_special_tokens and token < 2))


@pytest.mark.parametrize(
    ("stops", "tokens", "text"),
    [
        (["\n"], [2, 3], "Yes."),
        (["\nUser:"], [2, 6, 4, 5], "Yes no"),
        (["User"], [2, 4], "Yes\n"),
        (["no", "User"], [2, 4], "Yes\n"),
        (["Yes"], [2], ""),
        (["<|end|>"], [2, 6, 0], "Yes no"),
        ([".\n<|end|>"], [6, 2, 3, 0], " noYes"),
        (["hi"], [2, 1, 6, 5], "Yes no: "),
        (["|>"], [2, 1], "Yes<|pad"),
    ],
)
def test_a_stop_string_is_cut_where_generation_saw_it_special_tokens_included(stops, tokens, text) -> None:
    sampler = Sampler(Silent(), Characters(), RolloutSection(stop_strings=stops), [2], 0)  # type: ignore[arg-type]
    assert sampler._text(Completion(tuple(tokens), (0.0,) * len(tokens), StopReason.STOP_STRING)) == text


def test_half_a_character_before_a_stop_string_is_not_lost() -> None:
    class Bytes:
        def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    tokens = tuple("né\nx".encode()[:4])  # n, two bytes of é, the newline
    for stop, end, text in (("\n", 4, "né"), ("é", 3, "n")):
        sampler = Sampler(Silent(), Bytes(), RolloutSection(stop_strings=[stop]), [0], 0)  # type: ignore[arg-type]
        assert sampler._text(Completion(tokens[:end], (0.0,) * end, StopReason.STOP_STRING)) == text


def test_special_tokens_and_the_stop_token_are_no_text(sampler_of, tokenizer) -> None:
    sampler = sampler_of()
    assert sampler._text(Completion((4, 5, 2), (0.0,) * 3, StopReason.STOP_TOKEN)) == "w0 w1"
    assert sampler._text(Completion((4, 0, 5), (0.0,) * 3, StopReason.LENGTH)) == "w0 w1"


def test_a_stop_token_that_is_no_special_token_is_no_text_either(tokenizer) -> None:
    sampler = Sampler(Silent(), tokenizer, RolloutSection(), [5], 0)
    assert sampler._text(Completion((4, 5), (0.0,) * 2, StopReason.STOP_TOKEN)) == "w0"


def test_bytes_that_are_no_text_as_a_whole_are_sampled_with_stop_strings(tmp_path) -> None:
    """Byte tokens as in Llama's tokenizer: one stray byte makes its whole run unreadable, though the run's end would read as `!`."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"</s>": 0, "<0xC3>": 1, "<0x61>": 2, "<0x21>": 3}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4, eos_token_id=0, **size)).eval()
    sampler = native_sampler(model, tokenizer, RolloutSection(max_new_tokens=40, stop_strings=["!"], slots=32), [0], seed=0)
    batch = sampler.sample(request(1, samples=32), [], [PromptRecord(1, "a", (2,), {}, "f", 0)]).payload
    misleading = 0
    for row in range(len(batch)):
        tokens = batch.response_tokens_BT[row][batch.response_mask_BT[row]].tolist()
        stopped = batch.stop_reason_B[row] == StopReason.STOP_STRING
        assert ("!" in tokenizer.decode(tokens)) == stopped and "!" not in batch.completions[row]
        misleading += not stopped and any("!" in tokenizer.decode(tokens[max(0, end - 8) : end]) for end in range(len(tokens) + 1))
    assert misleading and (batch.stop_reason_B == StopReason.STOP_STRING).any()


def test_an_engine_is_asked_with_the_settings_of_the_run_and_its_completions_are_packed(prompts, tokenizer) -> None:
    """Whatever completes rows will do: the engine sees token ids, ids of prompts and samples, limits and the key."""
    asked: list[Any] = []

    class Echo:
        def generate(self, rows: Sequence[Any], params: Any, key: Any) -> Any:
            asked.append((rows, params, key))
            return [
                Completion((*row.prompt_tokens[1:], 2), (-0.5,) * len(row.prompt_tokens), StopReason.STOP_TOKEN) for row in rows
            ], Tally()

    section = RolloutSection(max_new_tokens=8, temperature=0.7, stop_strings=["x"])
    batch = Sampler(Echo(), tokenizer, section, [2, 3], seed=5).sample(request(5, samples=1), [], prompts).payload
    (rows, params, key), *rest = asked
    assert not rest and [row.prompt_id for row in rows] == [100, 101, 102, 103, 104] and (key.seed, key.stream, key.step) == (5, "train", 3)
    assert (params.max_new_tokens, params.temperature, params.stop_tokens, params.stop_strings) == (8, 0.7, (2, 3), ("x",))
    assert batch.completions == tuple(record.text for record in prompts) and batch.rollout_logprobs_BT[0, 0] == -0.5


def test_special_tokens_show_where_stop_strings_are_looked_for(tokenizer) -> None:
    assert decoder(tokenizer)([4, 2]) == "w0 </s>" and decoder(tokenizer, skip_special_tokens=True)([4, 2]) == "w0"
