"""How far are vLLM's log-probs from the trainer's, and why? One cause at a time, and what is left once it is accounted for.

vLLM samples, the trainer's own forward (`PolicyModule`, fp32) scores the same tokens. Causes, each beside an arrangement that is otherwise
exact (fp32, same weights, log-probs of the distribution at the sampling temperature):

temperature   vLLM's default is the log-prob at temperature 1, whatever it samples at; accounted for: the trainer at temperature 1
kept mass     with top-p vLLM samples from, and reports, the filtered distribution; accounted for: the trainer's own kept mass
staleness     the trainer has taken one optimizer step since; accounted for: the weights are pushed, and vLLM samples anew
precision     vLLM in bf16. The trainer in bf16 too does not account for it: it rounds elsewhere, by as much on its own

Runs in the environment of vLLM (`bash launch/vllm_env.sh`), both sides in one process:

    .venv-vllm/bin/python benchmarks/mismatch.py --model path/to/model
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
import typer
from manifest import RESULTS, manifest, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.logprobs import HeadOptions
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.rollout.native import RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams
from rlhf_dist.rollout.vllm import VllmEngine, VllmSettings, request_seed

OPENINGS = (
    "Once upon a time", "One day, a little girl named Lily", "Tom and his dog went to the park.", "The big red ball",
    "There was a bird who", "Mom said to Ben,", "In the garden there was", "Lucy was sad because",
)  # fmt: skip
KEY = SamplingKey(seed=0, stream="train", step=0)
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What is measured on."""

    model: str
    temperature: float
    top_p: float
    new_tokens: int
    samples: int
    learning_rate: float


@dataclass(frozen=True)
class Sampled:
    """Tokens with the log-probs that vLLM reported, one entry a row."""

    rows: list[RolloutRow]
    tokens: list[tuple[int, ...]]
    logprobs: list[tuple[float, ...]]


@dataclass(frozen=True)
class Gap:
    """vLLM's log-prob minus the trainer's, over tokens, in nats; `ratio`: mean |ρ − 1|, ρ the trainer's probability over vLLM's."""

    mean: float
    mean_absolute: float
    p99: float
    largest: float
    ratio: float
    tokens: int


def main(
    model: Annotated[str, typer.Option(help="model folder with a tokenizer")],
    temperature: Annotated[float, typer.Option(help="of sampling and of the trainer's log-probs")] = 0.7,
    top_p: Annotated[float, typer.Option(help="where the kept mass is measured")] = 0.9,
    new_tokens: Annotated[int, typer.Option(help="tokens of a completion")] = 64,
    samples: Annotated[int, typer.Option(help="completions of each of the eight prompts")] = 8,
    learning_rate: Annotated[float, typer.Option(help="of the one AdamW step that makes vLLM's weights stale")] = 1e-5,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
) -> None:
    """Measures every cause and prints a table; the figures go to benchmarks/results/ as JSON."""
    setting = Setting(model, temperature, top_p, new_tokens, samples, learning_rate)
    policy = load(model, torch.float32)
    gaps = exact_and_stale(setting, policy) | reported(setting, policy) | half_precision(setting, policy)
    facts = manifest("vllm", asdict(setting) | {"model": Path(model).name}, torch.get_num_threads(), "cpu")
    facts.versions["vllm"] = vllm_version()
    show(setting, gaps)
    write(f"mismatch_{Path(model).name}_cpu", {name: asdict(gap) for name, gap in gaps.items()} | {"manifest": asdict(facts)}, results)


def exact_and_stale(setting: Setting, policy: Any) -> dict[str, Gap]:
    """Nothing amiss; one update behind; the update pushed."""
    newer = copy.deepcopy(policy)
    with engine(setting, "fp32") as vllm:
        sampled = sample(vllm, setting)
        step(newer, sampled, setting)
        gaps = {"nothing": gap(sampled, score(policy, sampled, setting.temperature))}
        gaps["staleness"] = gap(sampled, score(newer, sampled, setting.temperature))
        vllm.load_bucket(weights(newer))
        vllm.finish_sync(1)
        fresh = sample(vllm, setting)
    return gaps | {"staleness, accounted for": gap(fresh, score(newer, fresh, setting.temperature))}


def reported(setting: Setting, policy: Any) -> dict[str, Gap]:
    """What vLLM itself offers: log-probs at temperature 1, or of the filtered distribution."""
    with plain_vllm(setting, "raw_logprobs") as llm:
        raw = sample_plain(llm, setting, 1.0)
    with plain_vllm(setting, "processed_logprobs") as llm:
        filtered = sample_plain(llm, setting, setting.top_p)
    unfiltered, kept = score(policy, filtered, setting.temperature), kept_mass(policy, filtered, setting)
    return {
        "temperature": gap(raw, score(policy, raw, setting.temperature)),
        "temperature, accounted for": gap(raw, score(policy, raw, 1.0)),
        "kept mass": gap(filtered, unfiltered),
        "kept mass, accounted for": gap(filtered, [one - mass.log() for one, mass in zip(unfiltered, kept, strict=True)]),
    }


def half_precision(setting: Setting, policy: Any) -> dict[str, Gap]:
    """vLLM in bf16 beside the trainer in fp32 and in bf16, and those two beside each other."""
    with engine(setting, "bf16") as vllm:
        sampled = sample(vllm, setting)
    full, half = (score(one, sampled, setting.temperature) for one in (policy, load(setting.model, torch.bfloat16)))
    trainer = Sampled(sampled.rows, sampled.tokens, [tuple(row.tolist()) for row in half])
    return {
        "precision": gap(sampled, full),
        "precision, trainer in bf16 too": gap(sampled, half),
        "precision, the trainer alone": gap(trainer, full),
    }


def vllm_version() -> str:
    """vLLM's version."""
    import vllm

    return str(vllm.__version__)


def load(folder: str, dtype: torch.dtype) -> Any:
    """The trainer's model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def weights(model: Any) -> Mapping[str, Tensor]:
    """As a trainer without adapters exports them."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def work(setting: Setting) -> list[RolloutRow]:
    """The prompts, each sampled several times."""
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    prompts = [tuple(tokenizer(text).input_ids) for text in OPENINGS]
    return [RolloutRow(prompt, number, sample) for number, prompt in enumerate(prompts) for sample in range(setting.samples)]


def longest(setting: Setting) -> int:
    """Tokens of the longest row."""
    return setting.new_tokens + max(len(row.prompt_tokens) for row in work(setting))


@contextmanager
def engine(setting: Setting, dtype: Any) -> Iterator[VllmEngine]:
    """Our engine."""
    vllm = VllmEngine(VllmSettings(setting.model, longest(setting), dtype=dtype, kv_cache_gib=0.5))
    try:
        yield vllm
    finally:
        vllm.close()


@contextmanager
def plain_vllm(setting: Setting, mode: Any) -> Iterator[Any]:
    """vLLM with one of its own ways to report log-probs."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        setting.model, dtype="float32", max_model_len=longest(setting), kv_cache_memory_bytes=GIB // 2, generation_config="vllm",
        logprobs_mode=mode, enable_prefix_caching=False, enforce_eager=True, skip_tokenizer_init=True,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def sample(vllm: VllmEngine, setting: Setting) -> Sampled:
    """All rows by our engine."""
    rows = work(setting)
    completions, _ = vllm.generate(rows, SamplingParams(setting.new_tokens, temperature=setting.temperature), KEY)
    return Sampled(rows, [completion.tokens for completion in completions], [completion.logprobs for completion in completions])


def sample_plain(llm: Any, setting: Setting, top_p: float) -> Sampled:
    """All rows by vLLM itself, with the seeds of our engine."""
    from vllm import SamplingParams as Params

    rows = work(setting)
    params = [
        Params(max_tokens=setting.new_tokens, temperature=setting.temperature, top_p=top_p, logprobs=0, ignore_eos=True, detokenize=False,
               seed=request_seed(KEY, row.prompt_id, row.sample_index))
        for row in rows
    ]  # fmt: skip
    outputs = [
        output.outputs[0]
        for output in llm.generate([{"prompt_token_ids": list(row.prompt_tokens)} for row in rows], params, use_tqdm=False)
    ]
    tokens = [tuple(output.token_ids) for output in outputs]
    logprobs = [tuple(place[token].logprob for place, token in zip(output.logprobs, output.token_ids, strict=True)) for output in outputs]
    return Sampled(rows, tokens, logprobs)


def batch_of(sampled: Sampled) -> SequenceBatch:
    """The rows as the trainer takes them; completions are of one length."""
    width = max(len(row.prompt_tokens) for row in sampled.rows)
    prompts_BP = torch.tensor([(0,) * (width - len(row.prompt_tokens)) + row.prompt_tokens for row in sampled.rows])
    lengths_B = torch.tensor([len(row.prompt_tokens) for row in sampled.rows])
    responses_BT = torch.tensor(sampled.tokens)
    mask_BT = torch.ones_like(responses_BT, dtype=torch.bool)
    return SequenceBatch(prompts_BP, torch.arange(width) >= width - lengths_B[:, None], responses_BT, mask_BT, mask_BT.clone())


@torch.no_grad()
def score(model: Any, sampled: Sampled, temperature: float) -> list[Tensor]:
    """The trainer's log-probs of the tokens, float32 [T] a row."""
    module = PolicyModule(model, HeadOptions(temperature=temperature))
    return list(module(**module.inputs(batch_of(sampled)))["logprobs_BT"])


def step(model: Any, sampled: Sampled, setting: Setting) -> None:
    """One AdamW step of a policy gradient, with advantages of 1 and −1 in turn."""
    module = PolicyModule(model, HeadOptions(temperature=setting.temperature))
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.0)
    advantages_B1 = torch.tensor([1.0 if row % 2 else -1.0 for row in range(len(sampled.rows))])[:, None]
    loss = -(advantages_B1 * module(**module.inputs(batch_of(sampled)))["logprobs_BT"]).mean()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def kept_mass(model: Any, sampled: Sampled, setting: Setting) -> list[Tensor]:
    """The probability that top-p leaves at each token, by the trainer's distribution: float32 [T] a row."""
    masses = []
    for row, tokens in zip(sampled.rows, sampled.tokens, strict=True):
        logits_SV = model(input_ids=torch.tensor([row.prompt_tokens + tokens]), use_cache=False).logits[0].float()
        probs_TV = (logits_SV[len(row.prompt_tokens) - 1 : -1] / setting.temperature).softmax(-1).sort(-1, descending=True).values
        before_TV = probs_TV.cumsum(-1) - probs_TV
        masses.append(probs_TV.where(before_TV < setting.top_p, 0.0).sum(-1))
    return masses


def gap(sampled: Sampled, trainer: Sequence[Tensor]) -> Gap:
    """All tokens of all rows together."""
    difference = torch.tensor(sampled.logprobs, dtype=torch.float64).flatten() - torch.stack(list(trainer)).double().flatten()
    absolute = difference.abs()
    return Gap(
        difference.mean().item(),
        absolute.mean().item(),
        absolute.quantile(0.99).item(),
        absolute.max().item(),
        ((-difference).exp() - 1).abs().mean().item(),
        len(difference),
    )


def show(setting: Setting, gaps: Mapping[str, Gap]) -> None:
    """The table a person reads."""
    title = f"{Path(setting.model).name}: vLLM's log-probs minus the trainer's, temperature {setting.temperature}, top-p {setting.top_p}"
    table = Table(title=f"{title}, one AdamW step of {setting.learning_rate}")
    for column in ("cause", "mean, nats", "mean |gap|", "99 %", "largest", "mean |ratio − 1|"):
        table.add_column(column, justify="right" if column != "cause" else "left")
    for name, one in gaps.items():
        table.add_row(name, f"{one.mean:+.1e}", f"{one.mean_absolute:.1e}", f"{one.p99:.1e}", f"{one.largest:.1e}", f"{one.ratio:.1e}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
