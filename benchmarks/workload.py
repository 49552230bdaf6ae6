"""What the benchmarks work on: random Llamas with a word tokenizer, ragged lengths, prompts, experience; and the job file of a PPO run.

Lengths are log-normal, a third of the limit on average before they are clipped, or all of the limit. Everything is drawn with fixed
seeds, so two scripts with the same numbers do the same work.

Started as a script it writes models, prompts and a config for `throughput.py` into a folder; random models go on to the limit there.

    python benchmarks/workload.py work --rows 32 --limit 128
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from limits import Sampled
from rich.console import Console

from rlhf_dist.contracts.flops import FlopModel

SPREAD, SHORTEST_PROMPT, LONGEST_PROMPT, VOCABULARY = 0.7, 8, 48, 32000
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
"""Of torch, and as our config calls them."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a random Llama: heads of 64, a feed-forward part 8/3 as wide, the head tied to the embeddings.

    All widths are multiples of 64, which 4-bit layers need on CPUs.
    """

    hidden: int = 512
    layers: int = 8
    vocabulary: int = VOCABULARY


@dataclass(frozen=True)
class Rounds:
    """Iterations of a run: those that are timed, and those before."""

    repeats: int
    warm_up: int = 0


@dataclass(frozen=True)
class Rows:
    """Rows of an iteration: prompts as token ids, and how many tokens each completion gets."""

    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple(map(len, self.prompts))

    def facts(self) -> dict[str, int]:
        """For a manifest."""
        return {"rows": len(self.lengths), "tokens": sum(self.lengths), "prompt_tokens": sum(self.prompt_lengths)}


def llama_config(shape: Shape, **others: Any) -> Any:
    """The transformers config of a shape."""
    from transformers import LlamaConfig

    heads = max(1, shape.hidden // 64)
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        **others,
    )


def word_tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """A tokenizer whose words are `t3`, `t4`, …; it puts <s> (id 1) before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{number}": number for number in range(3, vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_models(folder: Path, shape: Shape, *, scorer: bool = True, tokenizer: bool = True) -> tuple[str, str]:
    """Writes a random policy, and a sequence classifier of one label beside it; returns their folders."""
    from rlhf_dist.models.quiet import quiet_libraries

    quiet_libraries()
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    words = word_tokenizer(shape.vocabulary) if tokenizer else None
    kinds = {"policy": LlamaForCausalLM} | ({"scorer": LlamaForSequenceClassification} if scorer else {})
    for name, kind in kinds.items():
        kind(llama_config(shape, num_labels=1)).save_pretrained(folder / name)
        if words is not None:
            words.save_pretrained(folder / name)
    return str(folder / "policy"), str(folder / "scorer")


def ragged_lengths(rows: int, limit: int) -> list[int]:
    """Log-normal numbers of tokens in [2, limit], with a mean of limit / 3 before they are clipped."""
    import torch

    location = torch.tensor(limit / 3).log().item() - SPREAD**2 / 2
    drawn = torch.empty(rows).log_normal_(location, SPREAD, generator=torch.Generator().manual_seed(1))
    lengths: list[int] = drawn.round().clamp(2, limit).int().tolist()
    return lengths


def make_rows(rows: int, limit: int, *, ragged: bool = True, vocabulary: int = VOCABULARY) -> Rows:
    """Random prompts of up to 48 tokens, with completions of ragged or of full length."""
    lengths = ragged_lengths(rows, limit) if ragged else [limit] * rows
    draw = random.Random(1)
    prompts = [(1, *(draw.randrange(3, vocabulary) for _ in range(draw.randrange(SHORTEST_PROMPT - 1, LONGEST_PROMPT)))) for _ in lengths]
    return Rows(tuple(prompts), tuple(lengths))


def twice_the_batch(rows: Rows, vocabulary: int = VOCABULARY) -> Rows:
    """Every row once more, with other tokens: exactly twice the work."""
    draw = random.Random(2)
    others = [(1, *(draw.randrange(3, vocabulary) for _ in prompt[1:])) for prompt in rows.prompts]
    return Rows(rows.prompts + tuple(others), rows.lengths * 2)


def twice_the_length(rows: Rows, vocabulary: int = VOCABULARY) -> Rows:
    """Every prompt and every completion twice as long."""
    draw = random.Random(2)
    longer = [prompt + tuple(draw.randrange(3, vocabulary) for _ in prompt) for prompt in rows.prompts]
    return Rows(tuple(longer), tuple(2 * length for length in rows.lengths))


def write_job(folder: Path, models: tuple[str, str], workload: Mapping[str, Any], rows: Rows, *, rounds: Rounds, threads: int) -> Path:
    """Writes what a process that runs PPO iterations must know (`peers/ours_ppo.py`, `peers/trl_ppo.py`).

    Args:
        folder: of this process alone; made if need be. models: of `save_models`.
        workload: dtype and minibatches at least; goes to the manifest. `overrides`: `key=value` of our config, where there are any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {"policy": models[0], "scorer": models[1], "folder": str(folder)}
    job |= {
        "prompts": rows.prompts,
        "lengths": rows.lengths,
        "dtype": workload["dtype"],
        "minibatches": workload["minibatches"],
        "overrides": list(workload.get("overrides", ())),
    }
    job |= {"iterations": rounds.repeats + rounds.warm_up, "threads": threads, "workload": dict(workload) | rows.facts()} | asdict(rounds)
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def write_config(job: Mapping[str, Any]) -> Path:
    """Writes a job as the config of our program: one PPO epoch in one plain process, all models in one precision."""
    folder = Path(job["folder"])
    prompts = folder / "prompts.jsonl"
    text = [" ".join(f"t{token}" for token in prompt[1:]) for prompt in job["prompts"]]
    prompts.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in text), encoding="utf-8")
    engine = {"dtype": DTYPES[job["dtype"]]}
    trained = engine | {"optim": {"lr": 1e-6, "schedule": "constant"}}
    values = {
        "run": {"steps": job["iterations"], "output_dir": str(folder), "name": "ours"},
        "data": {"train": str(prompts), "max_prompt_tokens": max(map(len, job["prompts"]))},
        "policy": {"model": job["policy"]} | trained,
        "reference": engine,
        "value": {"model": job["scorer"], "head_init": "keep"} | trained,
        "reward": {"sources": [{"kind": "model", "name": "random", "model": job["scorer"]}]} | engine,
        "rollout": {"prompts_per_step": len(job["prompts"]), "max_new_tokens": max(job["lengths"]), "slots": len(job["prompts"])},
        # As TRL does it: the log-probs of sampling are the old ones.
        "algorithm": {"epochs": 1, "minibatches": job["minibatches"], "old_logprobs": "sampler"},
        "placement": {"launcher": "spmd", "threads_per_rank": job["threads"]},
    }
    path = folder / "ppo.yaml"
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")  # JSON is YAML
    return path


def sampled(shape: Shape) -> Sampled:
    """What the limits must know of a policy of that shape; its weights are not made."""
    import torch
    from transformers import LlamaForCausalLM

    from rlhf_dist.models.flops import forward_flops

    config, role = llama_config(shape), torch.nn.Module()
    with torch.device("meta"):
        role.model = LlamaForCausalLM(config)
    return Sampled(forward_flops(role), 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def without_head(model: FlopModel) -> FlopModel:
    """Of a model of the same layers with a head of one output: value, reward."""
    return FlopModel(model.linear, model.attention)


def experience(rows: Rows, vocabulary: int = VOCABULARY) -> Any:
    """Those rows as an `ExperienceBatch` ready to be trained on: random responses, log-probs and advantages."""
    import torch

    from rlhf_dist.contracts.experience import ExperienceBatch, StopReason

    generator = torch.Generator().manual_seed(3)
    count, wide, long = len(rows.lengths), max(rows.prompt_lengths), max(rows.lengths)
    prompt_BP = torch.tensor([[0] * (wide - len(prompt)) + list(prompt) for prompt in rows.prompts])
    starts_B, lengths_B = wide - torch.tensor(rows.prompt_lengths), torch.tensor(rows.lengths)
    mask_BT = torch.arange(long) < lengths_B[:, None]
    zeros_B, noise_BT = torch.zeros(count, dtype=torch.long), torch.randn(count, long, generator=generator)
    return ExperienceBatch(
        prompt_tokens_BP=prompt_BP,
        prompt_mask_BP=torch.arange(wide) >= starts_B[:, None],
        response_tokens_BT=torch.randint(3, vocabulary, (count, long), generator=generator),
        response_mask_BT=mask_BT,
        response_attention_BT=mask_BT,
        prompt_id_B=torch.arange(count),
        sample_index_B=zeros_B,
        policy_version_B=zeros_B,
        stop_reason_B=zeros_B + int(StopReason.LENGTH),
        rollout_logprobs_BT=noise_BT * 0.01 - 10.0,
        prompts=("",) * count,
        completions=("",) * count,
        old_logprobs_BT=noise_BT * 0.01 - 10.0,
        advantages_BT=noise_BT,
    )


def main(
    folder: Annotated[Path, typer.Argument(help="made if need be")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rows: Annotated[int, typer.Option(help="completions of an iteration")] = 32,
    limit: Annotated[int, typer.Option(help="longest completion, in tokens")] = 128,
    threads: Annotated[int, typer.Option(help="CPU threads of a rank")] = 2,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="layers")] = 8,
) -> None:
    """Writes random models, prompts and `ppo.yaml`."""
    folder = folder.absolute()
    models, work = save_models(folder, Shape(hidden, layers)), make_rows(rows, limit, ragged=False)
    job = write_job(folder, models, {"dtype": dtype, "minibatches": 4}, work, rounds=Rounds(5), threads=threads)
    Console().print(str(write_config(json.loads(job.read_text()))), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
