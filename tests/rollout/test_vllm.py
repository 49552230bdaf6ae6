"""The vLLM engine beside transformers and our own engine, on real vLLM (CPU builds too); what needs no vLLM is tested everywhere."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.models.checksum import checksum
from rlhf_dist.rollout.native import Completion, NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams
from rlhf_dist.rollout.vllm import VllmEngine, VllmSettings, request_seed

CONTEXT, SLOTS = 256, 6
KEY = SamplingKey(seed=3, stream="train", step=5)
PARAMS = SamplingParams(16, temperature=0.7)
INSTALLED = importlib.util.find_spec("vllm") is not None


def real(test: Callable[..., None]) -> Callable[..., None]:
    """A test of the real engine."""
    skip = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed here: bash launch/test.sh --vllm")
    marked: Callable[..., None] = pytest.mark.vllm(skip(test))
    return marked


@dataclass
class Case:
    """A model in transformers, and an engine that holds the same weights."""

    folder: str
    model: Any
    engine: VllmEngine
    prompts: list[tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]

    def rows(self) -> list[RolloutRow]:
        """Two samples of each prompt."""
        return [RolloutRow(prompt, 10 + i, sample) for i, prompt in enumerate(self.prompts) for sample in range(2)]

    def sample(self, rows: Sequence[RolloutRow] | None = None, params: SamplingParams = PARAMS, key: SamplingKey = KEY) -> list[Completion]:
        """Completions of the rows."""
        return self.engine.generate(self.rows() if rows is None else rows, params, key)[0]

    def sync(self, model: Any, version: int = 1) -> int:
        """Pushes a model's weights in buckets of five."""
        weights = list(exported(model).items())
        for start in range(0, len(weights), 5):
            self.engine.load_bucket(dict(weights[start : start + 5]))
        return self.engine.finish_sync(version)


def exported(model: Any) -> dict[str, torch.Tensor]:
    """Weights as the trainer sends them."""
    from rlhf_dist.models.lora import named_weights

    return {name: weight() for name, _, weight in named_weights(model)}


def moved(case: Case) -> Any:
    """The model after an update of every weight that is large enough to change its samples."""
    model = AutoModelForCausalLM.from_config(case.model.config).eval()
    model.load_state_dict(case.model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():  # a tied one comes once
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1 * weight.abs().mean())
    return model


@pytest.fixture(scope="module", params=["untied", "tied", "stories15M"])
def loaded(request: pytest.FixtureRequest, build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One engine at a time. The small models have a vocabulary that vLLM pads, and a generation config that nothing may follow."""
    if request.param == "stories15M":
        folder = request.getfixturevalue("shared") / "models" / request.param
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tuple(tokenizer(text).input_ids) for text in ("Once upon a time", "Lily and Tom went to", "The big")]
        decode = tokenizer.decode
    else:
        folder = tmp_path_factory.mktemp("vllm") / "model"
        config = LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=CONTEXT, tie_word_embeddings=request.param == "tied",
        )  # fmt: skip
        build(config).save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(40)), "top_k": 1, "temperature": 0.1}))
        prompts = [(5, 6, 7), (9,), (11, 5, 40, 3, 8, 8, 2)]
        decode = _letters
    prompts.append(prompts[0] * 40)  # longer than a block of keys and values, which is what a prefix cache keeps
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = 0.0625 if request.param == "stories15M" else 0.0006  # of a small model: nine blocks of 128 tokens
    engine = VllmEngine(VllmSettings(str(folder), CONTEXT, slots=SLOTS, kv_cache_gib=cache), decode=decode)
    yield Case(str(folder), model, engine, prompts, decode)
    engine.close()


@pytest.fixture
def case(loaded: Case) -> Iterator[Case]:
    """The engine with the weights of `loaded.model`, whatever the test before did."""
    if loaded.engine.version is not None or loaded.engine._sync is not None:
        missing = {name: weight for name, weight in exported(loaded.model).items() if name not in _arrived(loaded.engine)}
        loaded.engine.load_bucket(missing)
        loaded.engine.finish_sync(0)
        loaded.sync(loaded.model, 0)
    yield loaded


def _arrived(engine: VllmEngine) -> set[str]:
    return engine._sync.arrived if engine._sync else set()


def _letters(tokens: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token % 26) for token in tokens)


@real
def test_nearly_greedy_it_agrees_with_generate_and_with_the_native_engine(case: Case) -> None:
    params = SamplingParams(8, temperature=0.01)
    rows = case.rows()[::2]
    sampled = [completion.tokens for completion in case.sample(rows, params)]
    assert sampled == [completion.tokens for completion in NativeEngine(case.model, slots=4).generate(rows, params, KEY)[0]]
    plain = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=case.model.config.vocab_size, pad_token_id=0)
    for row, tokens in zip(rows, sampled, strict=True):
        output = case.model.generate(input_ids=torch.tensor([row.prompt_tokens]), generation_config=plain)
        assert tuple(output[0, len(row.prompt_tokens) :].tolist()) == tokens


@real
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_logprobs_are_those_of_a_plain_forward_at_the_temperature(
    case: Case, forward_gap: Callable[..., float], temperature: float
) -> None:
    rows = case.rows()
    sampled = case.sample(rows, SamplingParams(16, temperature=temperature))
    assert {len(completion.tokens) for completion in sampled} == {16}  # no stop token of the generation config
    assert len({completion.tokens for completion in sampled}) == len(rows)  # nor its top-k
    assert forward_gap(case.model, rows, sampled, temperature) <= 1e-4


@real
def test_law_9_a_completion_depends_on_its_own_row_alone(case: Case) -> None:
    rows = case.rows()
    together = case.sample(rows)
    assert case.sample(rows[::-1])[::-1] == together
    assert [case.sample([row])[0].tokens for row in rows] == [completion.tokens for completion in together]
    assert case.sample(rows[2:5]) == together[2:5]
    # More than there are slots, and more than the small models' key/value cache holds to the end: some are put off and prefilled anew.
    long = [RolloutRow(case.prompts[-1], 99, i) for i in range(9)]
    crowded = case.sample(long[:7] + rows + long[7:])
    assert crowded[7:-2] == together
    assert [completion.tokens for completion in crowded[:7]] == [case.sample([row])[0].tokens for row in long[:7]]
    for other in (SamplingKey(4, "train", 5), SamplingKey(3, "eval", 5), SamplingKey(3, "train", 6)):
        assert sum(a.tokens == b.tokens for a, b in zip(together, case.sample(rows, key=other), strict=True)) <= 1


@real
def test_a_stop_token_ends_a_completion_and_stays_in_it(case: Case) -> None:
    free = case.sample()
    stop = free[0].tokens[4]
    for whole, cut in zip(free, case.sample(params=SamplingParams(16, temperature=0.7, stop_tokens=(stop,))), strict=True):
        end = whole.tokens.index(stop) + 1 if stop in whole.tokens else 16
        reason = StopReason.STOP_TOKEN if stop in whole.tokens else StopReason.LENGTH
        assert cut == Completion(whole.tokens[:end], whole.logprobs[:end], reason)


@real
def test_a_stop_string_ends_a_completion_at_the_token_that_completes_it(case: Case) -> None:
    free = case.sample()
    text = case.decode(free[0].tokens[3:6])
    stop = text.strip()[:4]
    for whole, cut in zip(free, case.sample(params=SamplingParams(16, temperature=0.7, stop_strings=(stop,))), strict=True):
        ends = [end for end in range(1, 17) if stop in case.decode(whole.tokens[:end])]
        assert cut.stop_reason == (StopReason.STOP_STRING if ends else StopReason.LENGTH)
        assert cut.tokens == whole.tokens[: ends[0] if ends else 16]
    assert case.sample() == free  # what was cut off is gone


@real
def test_rows_have_limits_of_their_own_and_steps_are_counted(case: Case) -> None:
    rows = [RolloutRow(case.prompts[0], i, 0, limit) for i, limit in enumerate((1, 7, 30, 16))]
    completions, tally = case.engine.generate(rows, PARAMS, KEY)
    assert [len(completion.tokens) for completion in completions] == [1, 7, 16, 16]
    assert tally.means() == {"rollout/rows_per_step": pytest.approx((1 + 7 + 16 + 16) / 16)}
    assert case.engine.generate([], PARAMS, KEY)[0] == []


@real
@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        (RolloutRow((), 1, 0), PARAMS, "no token"),
        (RolloutRow((5,), 1, 0, 0), PARAMS, "max_new_tokens of the row is 0"),
        (RolloutRow((5,) * 250, 1, 0), PARAMS, "may take 266 tokens"),
        (RolloutRow((5,), 1, 0), SamplingParams(4, top_p=0.9), "unfiltered"),
        (RolloutRow((5,), 1, 0), SamplingParams(4, top_k=3), "unfiltered"),
        (RolloutRow((5,), 1, 0), SamplingParams(4, temperature=0.005), "temperature 0.005"),
    ],
)
def test_what_it_cannot_do_as_asked_it_refuses(case: Case, row: RolloutRow, params: SamplingParams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        case.sample([row], params)


@real
def test_an_update_changes_the_samples_of_a_prompt_seen_before(case: Case, forward_gap: Callable[..., float]) -> None:
    rows, before = case.rows(), case.sample()
    model = moved(case)
    assert case.sync(model, version=7) == checksum(exported(model).items())
    assert case.engine.version == 7
    after = case.sample()
    assert all(a.tokens != b.tokens for a, b in zip(before, after, strict=True))
    assert forward_gap(model, rows, after, 0.7) <= 1e-4  # no key, value or packed weight is left of before
    assert forward_gap(case.model, rows, after, 0.7) > 0.1
    case.sync(case.model, version=8)
    assert case.sample() == before


@real
def test_merged_adapters_are_weights_like_others(case: Case, forward_gap: Callable[..., float]) -> None:
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_config(case.model.config)
    plain.load_state_dict(case.model.state_dict())
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    case.sync(model)
    rows = case.rows()
    sampled = case.sample(rows)
    assert forward_gap(model, rows, sampled, 0.7) <= 1e-4
    with model.disable_adapter():
        assert forward_gap(model, rows, sampled, 0.7) > 1e-3


@real
def test_an_update_that_lacks_a_weight_is_refused_until_it_comes(case: Case, forward_gap: Callable[..., float]) -> None:
    model = moved(case)
    weights = exported(model)
    held_back = "model.layers.1.self_attn.k_proj.weight"  # vLLM keeps it as part of a larger weight
    case.engine.load_bucket({name: weight for name, weight in weights.items() if name != held_back})
    with pytest.raises(UserError, match=f"lacks 1 of {len(weights)} weights, {held_back} first"):
        case.engine.finish_sync(4)
    assert case.engine.version != 4
    with pytest.raises(UserError, match="not finished"):
        case.sample()
    case.engine.load_bucket({held_back: weights[held_back]})
    assert case.engine.finish_sync(4) == checksum(weights.items())
    assert forward_gap(model, case.rows(), case.sample(), 0.7) <= 1e-4


@real
def test_weights_that_do_not_fit_are_refused_by_name(case: Case) -> None:
    norm = exported(case.model)["model.norm.weight"]
    for bucket, message in (
        ({"model.extra.weight": norm}, "no weight called model.extra.weight"),
        ({"model.norm.weight": norm[:8]}, "what came is"),
    ):
        with pytest.raises(UserError, match=message):
            case.engine.load_bucket(bucket)
    case.engine.load_bucket({"model.norm.weight": norm})
    with pytest.raises(UserError, match="twice"):
        case.engine.load_bucket({"model.norm.weight": norm})


@real
def test_a_diverged_policy_is_named_and_leaves_no_request_behind(case: Case) -> None:
    before = case.sample()
    weights = exported(case.model)
    case.engine.load_bucket(weights | {"model.norm.weight": weights["model.norm.weight"] * float("nan")})
    case.engine.finish_sync(2)
    with pytest.raises(UserError, match="not finite"):
        case.sample()
    case.sync(case.model, 3)
    assert case.sample() == before


@real
def test_sleep_without_sleep_mode_is_refused(case: Case) -> None:
    with pytest.raises(UserError, match="without sleep mode"):
        case.engine.sleep()


@real
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can sleep")
def test_a_platform_that_cannot_sleep_says_so_at_once(case: Case) -> None:
    with pytest.raises(UserError, match="Sleep mode is not supported"):
        VllmEngine(VllmSettings(case.folder, CONTEXT, kv_cache_gib=0.0625, sleep=True))


@real
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="sleep mode needs a GPU")
def test_asleep_it_holds_little_and_awake_it_goes_on(shared: Path) -> None:
    settings = VllmSettings(str(shared / "models" / "stories15M"), CONTEXT, dtype="bf16", memory_share=0.3, sleep=True)
    engine = VllmEngine(settings)
    rows = [RolloutRow((1, 9038, 2501), 1, 0)]
    before, free = engine.generate(rows, PARAMS, KEY)[0], torch.cuda.mem_get_info()[0]
    engine.sleep()
    assert torch.cuda.mem_get_info()[0] > free + 0.2 * torch.cuda.mem_get_info()[1]
    with pytest.raises(UserError, match="sleeps"):
        engine.generate(rows, PARAMS, KEY)
    engine.wake()
    assert engine.generate(rows, PARAMS, KEY)[0] == before
    engine.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither"),
        ({"memory_share": 0.5, "kv_cache_gib": 1.0}, "both"),
        ({"memory_share": 1.5}, "memory_share is 1.5"),
        ({"kv_cache_gib": -1.0}, "kv_cache_gib is -1.0"),
        ({"kv_cache_gib": 1.0, "slots": 0}, "slots is 0"),
        ({"kv_cache_gib": 1.0, "max_model_len": 1}, "max_model_len is 1"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VllmSettings(**({"model": "folder", "max_model_len": 64} | values))


def test_without_vllm_it_names_the_extra(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"rlhf-dist\[vllm\]"):
        VllmEngine(VllmSettings(str(tiny_model), 64, kv_cache_gib=1.0))


def test_importing_the_module_imports_no_vllm() -> None:
    code = "import sys, rlhf_dist.rollout.vllm; print(sorted({'vllm', 'ray', 'deepspeed', 'bitsandbytes'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["train", "eval"]), st.integers(0, 9), st.integers(-(2**63), 2**63 - 1),
                          st.integers(0, 9)), unique=True))  # fmt: skip
def test_every_completion_has_a_seed_of_its_own(names: list[tuple[int, str, int, int, int]]) -> None:
    seeds = [request_seed(SamplingKey(seed, stream, step), prompt, sample) for seed, stream, step, prompt, sample in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_stable() -> None:
    assert request_seed(SamplingKey(1, "train", 2), -3, 4) == 7528105247246629878
