"""Tokens per second of the native rollout engine beside `transformers` `generate`: same model, same prompts, same ragged lengths.

Both sides sample at temperature 1 without filters from the same weights. Each row's length is drawn once (log-normal, mean a third of the
limit) and forced on both: a `StoppingCriteria` ends the row for `generate`, `RolloutRow.max_new_tokens` for the engine, and neither has a
stop token. So both produce the same number of tokens, and only those count. `generate` gets its prompts left-padded, one batch of
`--batch` rows after another, each lasting as long as its longest row; the engine gets all rows at once and as many slots as that batch.
Repeats alternate between the two, after one untimed round of each; the table shows medians.

The engine's log-probs are then held against a plain forward of each finished sequence.

    python benchmarks/rollout.py --model path/to/model --batch 64
    python benchmarks/rollout.py --hidden 512 --layers 6      # random weights, 51M parameters
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from rlhf_dist.rollout.native import Completion, NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams

RESULTS = Path(__file__).parent / "results"
SPREAD = 0.7
LONGEST_PROMPT = 24


@dataclass(frozen=True)
class Gap:
    """Absolute difference between the engine's log-probs and those of a plain forward, in nats."""

    mean: float
    p99: float
    largest: float
    within_1e_5: float
    allclose_1e_5: bool


class RowLengths(StoppingCriteria):
    """Ends every row at its own number of new tokens."""

    def __init__(self, width: int, lengths_B: Tensor) -> None:
        self._ends_B = width + lengths_B

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Which rows are done, bool [B]."""
        return self._ends_B <= input_ids.shape[1]


def main(
    model: Annotated[str, typer.Option(help="model folder; empty: a random Llama of --hidden and --layers")] = "",
    hidden: Annotated[int, typer.Option(help="hidden size of the random model")] = 512,
    layers: Annotated[int, typer.Option(help="layers of the random model")] = 6,
    rows: Annotated[int, typer.Option(help="completions in a round")] = 128,
    batch: Annotated[int, typer.Option(help="rows of one generate call, and slots of the engine")] = 64,
    limit: Annotated[int, typer.Option(help="longest completion, in tokens")] = 128,
    repeats: Annotated[int, typer.Option(help="timed rounds of each")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Runs both sides and prints a table; the figures go to benchmarks/results/ as JSON."""
    torch.set_num_threads(threads)
    policy: Any = load(model, hidden, layers).to(device=device, dtype=getattr(torch, dtype)).eval()
    work = make_rows(rows, limit, policy.config.vocab_size)
    params, tokens = SamplingParams(limit), sum(row.max_new_tokens or 0 for row in work)
    engine = NativeEngine(policy, slots=batch)
    seconds: dict[str, list[float]] = {"generate": [], "native": []}
    completions: list[Completion] = []
    for repeat in range(repeats + 1):
        key = SamplingKey(seed=0, stream="train", step=repeat)
        began = time.perf_counter()
        completions, _ = engine.generate(work, params, key)
        middle = time.perf_counter()
        run_generate(policy, work, batch)
        if repeat:
            seconds["native"].append(middle - began)
            seconds["generate"].append(time.perf_counter() - middle)
    gap = logprob_gap(policy, work, completions)
    report = {
        "model": Path(model).name or f"random Llama, hidden {hidden}, layers {layers}",
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "rows": rows,
        "batch": batch,
        "limit": limit,
        "tokens": tokens,
        "threads": threads,
        "dtype": dtype,
        "device": device,
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "seconds": seconds,
        "speedup": statistics.median(seconds["generate"]) / statistics.median(seconds["native"]),
        "logprob_gap": asdict(gap),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    show(report, gap)
    RESULTS.mkdir(exist_ok=True)
    name = f"rollout_{Path(model).name if model else f'llama{hidden}x{layers}'}_{device}_{dtype}_r{rows}_b{batch}_t{threads}.json"
    (RESULTS / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def load(model: str, hidden: int, layers: int) -> torch.nn.Module:
    """The model of a folder, or a random Llama with a vocabulary of 32000."""
    if model:
        loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return loaded
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(shape)


def make_rows(rows: int, limit: int, vocabulary: int) -> list[RolloutRow]:
    """Random prompts of 4 to 24 tokens with log-normal completion lengths, in [1, limit]; before clipping their mean is limit / 3."""
    generator = torch.Generator().manual_seed(1)
    location = torch.tensor(limit / 3).log().item() - SPREAD**2 / 2
    lengths = torch.empty(rows).log_normal_(location, SPREAD, generator=generator).round().clamp(1, limit).int().tolist()
    widths = torch.randint(4, LONGEST_PROMPT + 1, (rows,), generator=generator).tolist()
    prompts = [tuple(torch.randint(3, vocabulary, (width,), generator=generator).tolist()) for width in widths]
    return [RolloutRow(prompt, i, 0, length) for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))]


def run_generate(model: torch.nn.Module, rows: list[RolloutRow], batch: int) -> None:
    """`generate` over all rows, `batch` at a time."""
    device = next(model.parameters()).device
    limit = max(row.max_new_tokens or 0 for row in rows)
    # What is left at None would be filled from the model's own generation config, so the stop token is one that no model can emit.
    never = model.config.vocab_size  # type: ignore[union-attr]
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=limit, use_cache=True, pad_token_id=0, eos_token_id=never
    )
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(len(row.prompt_tokens) for row in part)
        tokens = torch.tensor([(0,) * (width - len(row.prompt_tokens)) + row.prompt_tokens for row in part], device=device)
        mask = torch.tensor([[0] * (width - len(row.prompt_tokens)) + [1] * len(row.prompt_tokens) for row in part], device=device)
        lengths_B = torch.tensor([row.max_new_tokens for row in part], device=device)
        criteria = StoppingCriteriaList([RowLengths(width, lengths_B)])
        output = model.generate(  # type: ignore[operator]
            input_ids=tokens, attention_mask=mask, generation_config=config, stopping_criteria=criteria
        )
        if output.shape[1] != width + int(lengths_B.max()):
            raise RuntimeError(f"generate made {output.shape[1] - width} tokens, not the {int(lengths_B.max())} of its longest row")


@torch.no_grad()
def logprob_gap(model: torch.nn.Module, rows: list[RolloutRow], completions: list[Completion]) -> Gap:
    """The engine's log-probs against one forward per sequence, without cache or padding."""
    device = next(model.parameters()).device
    gaps, sizes = [], []
    for row, completion in zip(rows, completions, strict=True):
        tokens = torch.tensor([row.prompt_tokens + completion.tokens], device=device)
        logprobs = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        chosen = logprobs[len(row.prompt_tokens) - 1 : -1].gather(1, tokens[0, len(row.prompt_tokens) :, None])[:, 0].cpu()
        gaps.append((chosen - torch.tensor(completion.logprobs)).abs())
        sizes.append(chosen.abs())
    gap, size = torch.cat(gaps), torch.cat(sizes)
    return Gap(
        mean=gap.mean().item(),
        p99=gap.quantile(0.99).item(),
        largest=gap.max().item(),
        within_1e_5=(gap <= 1e-5).float().mean().item(),
        allclose_1e_5=bool((gap <= 1e-5 + 1e-5 * size).all()),
    )


def show(report: dict, gap: Gap) -> None:
    """The table a person reads."""
    size = f"{report['rows']} rows in batches of {report['batch']}, {report['threads']} threads"
    table = Table(title=f"{report['model']}, {report['dtype']}, {size}")
    for column in ("", "tokens/s", "seconds (median)"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in report["seconds"].items():
        table.add_row(name, f"{report['tokens_per_second'][name]:.0f}", f"{statistics.median(values):.2f}")
    table.add_row("speed-up", f"{report['speedup']:.2f}×", "")
    console = Console()
    console.print(table)
    console.print(
        f"log-probs against a full forward: mean {gap.mean:.1e}, p99 {gap.p99:.1e}, largest {gap.largest:.1e}, "
        f"{gap.within_1e_5:.2%} of tokens within 1e-5"
    )


if __name__ == "__main__":
    typer.run(main)
