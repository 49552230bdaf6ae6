"""One PPO iteration beside TRL's PPO trainer: the same models, prompts, forced lengths, minibatches and optimizer steps, on one machine.

Four Llama-shaped models of 41M parameters with random weights (policy, reference, value, reward), 32 prompts of up to 48 tokens,
completions of up to 128: ragged (log-normal, a third of the limit on average) or all of full length; one PPO epoch of four minibatches.
Each side is a process of its own in an environment of its own with the same torch and the same number of threads; they take turns, one
iteration at a time, and the table shows medians. Iterations before `--warm-up` are not counted.

What differs, because it is what is measured: ours drops finished rows and sorts microbatches by length, and keeps fp32 master weights
with bf16. Both generate, score with four models, estimate advantages and take four steps of two optimisers' worth of AdamW.

    python -m venv peer && peer/bin/pip install torch==2.13.0 trl==1.12.0 "transformers<5.20"
    python benchmarks/against_trl.py --peer peer/bin/python --dtype bfloat16
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import Manifest, check_alike, spread, write
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SPREAD, LONGEST_PROMPT, VOCABULARY = 0.7, 48, 32000


def main(
    peer: Annotated[Path, typer.Option(help="Python of the environment that has TRL")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    ragged: Annotated[bool, typer.Option(help="log-normal lengths, or all of full length")] = True,
    rows: Annotated[int, typer.Option(help="completions of an iteration")] = 32,
    limit: Annotated[int, typer.Option(help="longest completion, in tokens")] = 128,
    repeats: Annotated[int, typer.Option(help="timed iterations of each side")] = 5,
    warm_up: Annotated[int, typer.Option(help="iterations before those")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each side")] = 2,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="layers")] = 8,
) -> None:
    """Runs both sides in turns and prints a table; the figures go to benchmarks/results/ as JSON."""
    workload = {"dtype": dtype, "ragged": ragged, "rows": rows, "limit": limit, "hidden": hidden, "layers": layers, "minibatches": 4}
    with tempfile.TemporaryDirectory() as temporary:
        job = make_job(Path(temporary), workload, repeats + warm_up, threads)
        ours = Side([sys.executable, str(HERE / "peers" / "ours_ppo.py"), str(job)])
        theirs = Side([str(peer), str(HERE / "peers" / "trl_ppo.py"), str(job)])
        check_alike(ours.manifest, theirs.manifest)
        measured: dict[str, list[dict[str, float]]] = {"ours": [], "TRL": []}
        for repeat in range(repeats + warm_up):
            for name, side in (("ours", ours), ("TRL", theirs)):
                line = side.iteration()
                if repeat >= warm_up:
                    measured[name].append(line)
        for side in (ours, theirs):
            side.close()
    report = summary(measured, workload, ours.manifest, theirs.manifest)
    show(report)
    shape = "ragged" if ragged else "full"
    write(f"against_trl_{shape}_{dtype}_r{rows}_t{threads}", report)


class Side:
    """A process that runs one iteration each time it is told to."""

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("OMP_NUM_THREADS", None)
        self.log: Any = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.manifest = Manifest(**self.read("MANIFEST"))

    def read(self, what: str) -> dict[str, Any]:
        """The next line of a kind."""
        for line in self.process.stdout:
            if line.startswith(what):
                found: dict[str, Any] = json.loads(line.removeprefix(what))
                return found
        self.log.seek(0)
        raise RuntimeError(f"{self.process.args} ended:\n{self.log.read()[-3000:]}")

    def iteration(self) -> dict[str, float]:
        """Seconds of one iteration."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read("ITERATION")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def make_job(folder: Path, workload: dict[str, Any], iterations: int, threads: int) -> Path:
    """Writes models, prompts, lengths."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    hidden = workload["hidden"]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=workload["layers"],
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        num_labels=1,
    )
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{number}": number for number in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    for name, kind in (("policy", LlamaForCausalLM), ("scorer", LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(1)
    location = torch.tensor(workload["limit"] / 3).log().item() - SPREAD**2 / 2
    generator = torch.Generator().manual_seed(1)
    drawn = (
        torch.empty(workload["rows"]).log_normal_(location, SPREAD, generator=generator).round().clamp(2, workload["limit"]).int().tolist()
    )
    lengths = drawn if workload["ragged"] else [workload["limit"]] * workload["rows"]
    prompts = [[1, *(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(7, LONGEST_PROMPT)))] for _ in lengths]
    job = {
        "policy": str(folder / "policy"),
        "scorer": str(folder / "scorer"),
        "folder": str(folder),
        "prompts": prompts,
        "lengths": lengths,
    }
    job |= {"dtype": workload["dtype"], "minibatches": workload["minibatches"], "iterations": iterations, "threads": threads}
    job["workload"] = workload | {"tokens": sum(lengths), "prompt_tokens": sum(map(len, prompts))}
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def summary(measured: dict[str, list[dict[str, float]]], workload: dict[str, Any], ours: Manifest, theirs: Manifest) -> dict[str, Any]:
    """What is kept: every measurement, medians with their spread, the ratio."""
    phases = {
        side: {phase: asdict(spread([line[phase] for line in lines])) for phase in lines[0] if all(phase in line for line in lines)}
        for side, lines in measured.items()
    }
    ratio = phases["TRL"]["seconds"]["median"] / phases["ours"]["seconds"]["median"]
    return {"ratio": ratio, "seconds": phases, "measured": measured, "ours": asdict(ours), "TRL": asdict(theirs)} | {"workload": workload}


def show(report: dict[str, Any]) -> None:
    """The table a person reads."""
    workload = report["ours"]["workload"]
    title = f"{workload['rows']} completions, {workload['tokens']} tokens, {workload['dtype']}, {report['ours']['threads']} threads"
    table = Table(title=title)
    for column in ("", "iteration, s", "lowest to highest", "generation, s"):
        table.add_column(column, justify="right" if column else "left")
    for side in ("ours", "TRL"):
        seconds = report["seconds"][side]
        total = seconds["seconds"]
        generation = f"{seconds['generate']['median']:.2f}"
        table.add_row(side, f"{total['median']:.2f}", f"{total['low']:.2f} to {total['high']:.2f}", generation)
    table.add_row("ratio", f"{report['ratio']:.2f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
