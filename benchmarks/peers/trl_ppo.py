"""One side of against_trl.py: TRL's PPO trainer (`trl.experimental.ppo`), run by the Python of its own environment.

It reads a job (JSON) from its first argument, runs iterations, and after each one prints a line of JSON and waits for a line on standard
input, so that the two sides take turns. The lengths of completions are forced by a logits processor: the stop token at a row's own last
place, never before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from datasets import Dataset
from manifest import manifest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class ForcedLengths(LogitsProcessor):
    """Row b ends with the stop token at its length, and not before."""

    def __init__(self, lengths: list[int], width: int, stop: int) -> None:
        self.lengths_B, self.width, self.stop = torch.tensor(lengths), width, stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V]."""
        last = self.lengths_B - 1 <= input_ids.shape[1] - self.width
        kept = scores[:, self.stop].clone()
        scores[:, self.stop] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.stop] = kept[last]
        return scores


class Turns(TrainerCallback):
    """Says how long an iteration took, then waits for its turn."""

    def __init__(self, clock: dict[str, float]) -> None:
        self.clock = clock

    def on_train_begin(self, *args, **kwargs) -> None:
        self.wait()

    def on_step_end(self, *args, **kwargs) -> None:
        line = {"seconds": time.perf_counter() - self.began, "generate": self.clock.pop("generate", 0.0)}
        print("ITERATION " + json.dumps(line), flush=True)
        self.wait()

    def wait(self) -> None:
        """Blocks until the driver says so."""
        sys.stdin.readline()
        self.began = time.perf_counter()


def main() -> None:
    """Runs the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["policy"], dtype=dtype) for _ in range(2))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(job["scorer"], dtype=dtype, num_labels=1) for _ in range(2))
    clock: dict[str, float] = {}
    plain = policy.generate

    def generate(*args, **kwargs):
        width = kwargs["input_ids"].shape[1]
        rows = [forced[tuple(row[row != tokenizer.pad_token_id].tolist())] for row in kwargs["input_ids"]]
        began = time.perf_counter()
        out = plain(*args, **kwargs, logits_processor=LogitsProcessorList([ForcedLengths(rows, width, tokenizer.eos_token_id)]))
        clock["generate"] = clock.get("generate", 0.0) + time.perf_counter() - began
        return out

    policy.generate = generate
    forced = {tuple(prompt): length for prompt, length in zip(job["prompts"], job["lengths"], strict=True)}
    batch = len(job["prompts"])
    config = PPOConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=batch,  # with accumulation steps the trainer would take one optimizer step for all minibatches
        gradient_accumulation_steps=1,
        num_mini_batches=job["minibatches"],
        num_ppo_epochs=1,
        total_episodes=batch * job["iterations"],
        local_rollout_forward_batch_size=batch,
        response_length=max(job["lengths"]),
        temperature=1.0,
        stop_token="eos",
        learning_rate=1e-6,
        kl_coef=0.05,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        logging_steps=10**6,
    )
    data = Dataset.from_dict({"input_ids": job["prompts"]})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Turns(clock)],
    )
    facts = manifest("TRL", job["workload"], job["threads"], "cpu")
    print("MANIFEST " + json.dumps(facts.__dict__), flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
