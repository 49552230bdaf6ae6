"""One way of generating, in turns: a side of generation.py, run by the Python of its own environment.

It reads a job (JSON) from its first argument and its name from the second, prints its manifest, and after each round prints a line of JSON
and waits for a line on standard input. Every row gets as many new tokens as the job says, from the distribution at temperature 1 without
filters; nothing stops a row before. The first round is followed by a look at the log-probs, where the side reports some.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from manifest import manifest
from measuring import now
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rlhf_dist.engines.memory import keep_freed_memory
from rlhf_dist.rollout.native import Completion, NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams

JOB: Mapping[str, Any] = json.loads(Path(sys.argv[1]).read_text())
Round = Callable[[int], "list[Completion] | int"]
"""Generates all rows once; returns completions with their log-probs, or the number of tokens made."""
Settings = dict[str, Any]
"""How a side does it, for its manifest."""
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
PAGE = 32
"""Tokens of a page of transformers' paged cache; its default, 256, is longer than most rows."""


def main() -> None:
    """Runs the job, a round a turn."""
    torch.set_num_threads(JOB["threads"])
    name, device = sys.argv[2], JOB["device"]
    (run, settings), gap = SIDES[name](), {}
    facts = manifest(name, JOB["workload"], JOB["threads"], device, warm_up=JOB["warm_up"], repeats=JOB["repeats"])
    facts.settings.update(settings)
    print("MANIFEST " + json.dumps(vars(facts) | {"versions": facts.versions | vllm_version()}), flush=True)
    for step, _ in enumerate(iter(sys.stdin.readline, "")):
        began, busy = now(device), time.process_time()
        made = run(step)
        seconds, busy = now(device) - began, time.process_time() - busy
        tokens = made if isinstance(made, int) else sum(len(completion.tokens) for completion in made)
        if tokens != sum(JOB["lengths"]):
            raise RuntimeError(f"{name} made {tokens} tokens, not {sum(JOB['lengths'])}")
        if step == 0 and not isinstance(made, int):
            gap = logprob_gap(made)
        print("ITERATION " + json.dumps({"seconds": seconds, "cpu_seconds": busy} | gap), flush=True)


def vllm_version() -> dict[str, str]:
    """vLLM's version, where this side has used it."""
    used: Any = sys.modules.get("vllm")
    return {"vllm": used.__version__} if used else {}


def model() -> Any:
    """The policy, in the precision of the job."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(JOB["policy"], dtype=getattr(torch, JOB["dtype"]))
    return loaded.to(JOB["device"]).eval()


def rows() -> list[RolloutRow]:
    """The work as the engines take it."""
    pairs = zip(JOB["prompts"], JOB["lengths"], strict=True)
    return [RolloutRow(tuple(prompt), i, 0, length) for i, (prompt, length) in enumerate(pairs)]


def engine_round(engine: Any) -> Round:
    """A round of an engine that keeps our contract."""
    work, params = rows(), SamplingParams(max(JOB["lengths"]))
    return lambda step: engine.generate(work, params, SamplingKey(0, "train", step))[0]


def native() -> tuple[Round, Settings]:
    """Our decode loop."""
    keep_freed_memory()  # as in every rank of ours on a CPU
    policy, slots = model(), len(JOB["lengths"])
    return engine_round(NativeEngine(policy, slots=slots)), {"slots": slots, "attention": policy.config._attn_implementation}


def vllm_engine() -> tuple[Round, Settings]:
    """vLLM as rlhf_dist uses it: a seed for every row, log-probs."""
    from rlhf_dist.rollout.vllm import VllmEngine, VllmSettings

    memory = {"kv_cache_gib": 2.0} if JOB["device"] == "cpu" else {"memory_share": 0.5}
    settings = VllmSettings(JOB["policy"], longest(), dtype=DTYPES[JOB["dtype"]], slots=len(JOB["lengths"]), **memory)
    engine = VllmEngine(settings)
    return engine_round(engine), vllm_settings(engine._llm)


def vllm_settings(llm: Any) -> Settings:
    """What vLLM says of itself; eager or compiled first of all."""
    config = llm.llm_engine.vllm_config
    compilation, cache, scheduler = config.compilation_config, config.cache_config, config.scheduler_config
    return {
        "execution": "eager" if config.model_config.enforce_eager else "compiled",
        "compilation_mode": str(compilation.mode),
        "cuda_graphs": str(compilation.cudagraph_mode),
        "slots": scheduler.max_num_seqs,
        "batched_tokens": scheduler.max_num_batched_tokens,
        "longest_row": config.model_config.max_model_len,
        "block": cache.block_size,
        "prefix_caching": cache.enable_prefix_caching,
        "logprobs": config.model_config.logprobs_mode,
    }


def vllm() -> tuple[Round, Settings]:
    """vLLM left to itself: no log-probs, one generator for all rows; compiled where the job asks for it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm import SamplingParams as Params

    memory = {"kv_cache_memory_bytes": 2 * 2**30} if JOB["device"] == "cpu" else {"gpu_memory_utilization": 0.5}
    llm = LLM(
        JOB["policy"],
        dtype=JOB["dtype"],
        skip_tokenizer_init=True,
        max_model_len=longest(),
        max_num_seqs=len(JOB["lengths"]),
        enable_prefix_caching=False,  # or the second round would find the prompts of the first
        generation_config="vllm",
        enforce_eager=not JOB["compile"],
        **memory,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in JOB["prompts"]]
    params = [Params(max_tokens=length, temperature=1.0, ignore_eos=True, detokenize=False) for length in JOB["lengths"]]

    def run(step: int) -> int:
        return sum(len(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False))

    return run, vllm_settings(llm)


class RowLengths(StoppingCriteria):
    """Ends every row at its own number of new tokens."""

    def __init__(self, width: int) -> None:
        self.ends_B = width + torch.tensor(JOB["lengths"], device=JOB["device"])

    def __call__(self, input_ids: Any, scores: Any, **kwargs: object) -> Any:
        """Which rows are done, bool [B]."""
        return self.ends_B <= input_ids.shape[1]


def sampling(policy: Any) -> GenerationConfig:
    """Plain sampling. What is left at None would be filled from the model's own, so the stop token is one that no model can emit."""
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(JOB["lengths"]), use_cache=True, pad_token_id=0,
        eos_token_id=policy.config.vocab_size,
    )  # fmt: skip


def generate() -> tuple[Round, Settings]:
    """`generate` of transformers: one left-padded batch that lasts as long as its longest row."""
    policy = model()
    width = max(map(len, JOB["prompts"]))
    pads = [[0] * (width - len(prompt)) for prompt in JOB["prompts"]]
    inputs = {
        "input_ids": torch.tensor([pad + prompt for pad, prompt in zip(pads, JOB["prompts"], strict=True)], device=JOB["device"]),
        "attention_mask": torch.tensor([pad + [1] * len(prompt) for pad, prompt in zip(pads, JOB["prompts"], strict=True)]).to(
            JOB["device"]
        ),
    }
    config, criteria = sampling(policy), StoppingCriteriaList([RowLengths(width)])

    def run(step: int) -> int:
        made = policy.generate(**inputs, generation_config=config, stopping_criteria=criteria).shape[1] - width
        return sum(min(length, made) for length in JOB["lengths"])

    return run, {"rows": len(JOB["lengths"]), "cache": "dynamic", "attention": policy.config._attn_implementation}


def continuous() -> tuple[Round, Settings]:
    """Continuous batching of transformers, its manager started once; blocks are not shared, since it serves stale ones after an update."""
    policy = model()
    blocks = 2 * len(JOB["lengths"]) * -(-longest() // PAGE)
    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=blocks, max_batch_tokens=2048, allow_block_sharing=False, use_cuda_graph=JOB["device"] != "cpu"
    )
    manager = policy.init_continuous_batching(generation_config=sampling(policy), continuous_batching_config=settings)
    manager.start()

    def run(step: int) -> int:
        for prompt, length in zip(JOB["prompts"], JOB["lengths"], strict=True):
            manager.add_request(prompt, max_new_tokens=length)
        made, waiting = 0, len(JOB["lengths"])
        while waiting:
            result = manager.get_result(timeout=10)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended")
            if result is not None and result.is_finished():
                made, waiting = made + len(result.generated_tokens), waiting - 1
        return made

    facts = {name: getattr(settings, name) for name in ("page_size", "num_blocks", "max_batch_tokens", "allow_block_sharing")}
    return run, facts | {"cuda_graph": settings.use_cuda_graph, "attention": policy.config._attn_implementation}


SIDES: dict[str, Callable[[], tuple[Round, Settings]]] = {
    "native": native,
    "generate": generate,
    "continuous": continuous,
    "vllm": vllm,
    "vllm_engine": vllm_engine,
}


def longest() -> int:
    """Tokens of the longest row."""
    return max(len(prompt) + length for prompt, length in zip(JOB["prompts"], JOB["lengths"], strict=True))


@torch.no_grad()
def logprob_gap(completions: list[Completion]) -> dict[str, float]:
    """Log-probs of the sampler against one plain forward of each row, without cache or padding: mean and largest difference in nats."""
    policy, gaps = model(), []
    for row, completion in zip(rows(), completions, strict=True):
        tokens = torch.tensor([row.prompt_tokens + completion.tokens], device=JOB["device"])
        logprobs = policy(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        chosen = logprobs[len(row.prompt_tokens) - 1 : -1].gather(1, tokens[0, len(row.prompt_tokens) :, None])[:, 0].cpu()
        gaps.append((chosen - torch.tensor(completion.logprobs)).abs())
    gap = torch.cat(gaps)
    return {"gap_mean": gap.mean().item(), "gap_largest": gap.max().item()}


if __name__ == "__main__":
    main()
