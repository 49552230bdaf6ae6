"""One side of against_trl.py: TRL's PPO trainer (`trl.experimental.ppo`), run by the Python of its own environment.

It reads a job (JSON) from its first argument, runs iterations, and after each one prints a line of JSON with its seconds, one with what it
did (`likeness.py`), and waits for a line on standard input, so that the two sides take turns.

Completions are those that our side has just sampled (`samples.json` of the job's folder): a logits processor leaves TRL's sampler one token
to draw, and padding once a row is over, while the log-probs it keeps are the raw ones. Minibatches are our side's too. So both sides train
on the same, and what they report of the update can be compared; the work of sampling stays the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from datasets import Dataset
from likeness import SAMPLES, digest, model_facts, optimizer_facts, special_tokens
from manifest import manifest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

MASKED_MEANS = 4
"""How often TRL takes a masked mean in a microbatch: value loss, share of clipped values, policy loss, share of clipped tokens."""


class GivenTokens(LogitsProcessor):
    """Leaves row b its own next token, and padding after the last."""

    def __init__(self, rows: list[list[int]], width: int, padding: int) -> None:
        self.width = width
        self.tokens_BT = torch.full((len(rows), max(map(len, rows))), padding)
        for number, row in enumerate(rows):
            self.tokens_BT[number, : len(row)] = torch.tensor(row)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V]; those that came stay as they are, since the log-probs are taken from them."""
        column_B1 = self.tokens_BT[:, input_ids.shape[1] - self.width, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, column_B1, 0.0)


class Watch:
    """Remembers what an iteration did: what was generated, and what the optimiser was given."""

    def __init__(self, job: dict) -> None:
        self.folder, self.trainer = Path(job["folder"]), None
        self.measures_gradients = job["warm_up"]
        self.samples, self.given = {}, {}
        self.clear()

    def clear(self) -> None:
        """Nothing was done yet."""
        self.seconds, self.prompts, self.pairs, self.metrics = 0.0, [], [], {}
        self.masks, self.means, self.steps, self.gradients = [], [], 0, {}

    def read(self) -> None:
        """What our side did in this round."""
        self.samples = json.loads((self.folder / SAMPLES).read_text())
        self.given = {tuple(prompt): completion for prompt, completion in self.samples["rows"]}

    def generate(self, plain, tokenizer):
        """The policy's `generate`, with the given tokens and raw logits."""
        padding, stop = tokenizer.pad_token_id, tokenizer.eos_token_id
        other = stop + 1  # in the place of a token that would end a row here before its time

        def generate(*args, **kwargs):
            began = time.perf_counter()
            width = kwargs["input_ids"].shape[1]
            self.prompts = [tuple(row[row != padding].tolist()) for row in kwargs["input_ids"]]
            rows = [[other if token in (padding, stop) else token for token in self.given[prompt]] for prompt in self.prompts]
            kwargs |= {"output_scores": False, "output_logits": True}
            made = plain(*args, **kwargs, logits_processor=LogitsProcessorList([GivenTokens(rows, width, padding)]))
            made.scores = made.logits
            lengths = (made.sequences[:, width:] != padding).sum(1).tolist()
            self.pairs = [(*prompt, length) for prompt, length in zip(self.prompts, lengths, strict=True)]
            self.seconds += time.perf_counter() - began
            return made

        return generate

    def permutation(self, plain):
        """numpy's, but for the order of the rows of an update: that is our side's."""

        def permutation(count, *args):
            if count != len(self.prompts):
                return plain(count, *args)
            self.masks, self.means = [], []  # the update begins; those before were of whitening
            return np.array([self.prompts.index(tuple(prompt)) for prompt in self.samples["order"]])

        return permutation

    def masked_mean(self, plain):
        """TRL's, which tells which tokens are trained on, and the losses."""

        def masked_mean(values, mask, axis=None):
            self.masks.append(mask)
            self.means.append(plain(values, mask, axis))
            return self.means[-1]

        return masked_mean

    def before_step(self, *_) -> None:
        """Of the first minibatch of an iteration of the warm-up, the norm of the gradient of both models; it would take time elsewhere."""
        if self.steps == 0 and self.measures_gradients > 0:
            self.measures_gradients -= 1
            model, share = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.args.vf_coef
            self.gradients = {"policy_gradient": norm(model.policy), "value_gradient": norm(model.value_model) / share}
        self.steps += 1

    def did(self) -> dict:
        """The facts of `likeness`; one optimiser trains both models."""
        policy = self.masks[2::MASKED_MEANS]
        order, rows = self.samples["order"], [len(mask) for mask in policy]
        starts = np.cumsum([0, *rows])
        minibatches = [digest(order[start : start + size]) for start, size in zip(starts, rows, strict=False)]
        lr = [self.metrics["lr"]]
        return {
            "rows": len(self.prompts),
            "prompts": digest(self.prompts),
            "completion_lengths": digest(self.pairs),
            "sampled_tokens": sum(pair[-1] for pair in self.pairs),
            "special_tokens": special_tokens(self.given[prompt] for prompt in self.prompts),
            "minibatches": {"policy": minibatches, "value": minibatches},
            "trained_tokens": dict.fromkeys(("policy", "value"), int(sum(mask.sum() for mask in policy))),
            "optimizer_steps": {"policy": self.steps, "value": self.steps},
            "lr": {"policy": lr, "value": lr},
        }

    def result(self) -> dict:
        """The results of `likeness`."""
        names = {
            "surprise": "objective/entropy",
            "score": "objective/scores",
            "kl": "objective/kl",
            "clipped": "policy/clipfrac_avg",
        }
        losses = {"policy_loss": float(self.means[2]), "value_loss": 0.5 * float(self.means[0])}  # of the first minibatch
        return {name: self.metrics[theirs] for name, theirs in names.items()} | losses | self.gradients


def norm(model) -> float:
    """Of the gradient of all weights."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


class Turns(TrainerCallback):
    """Says how long an iteration took and what it did, then waits for its turn."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, *args, **kwargs) -> None:
        self.wait()

    def on_log(self, *args, logs: dict, **kwargs) -> None:
        self.watch.metrics = dict(logs)

    def on_step_end(self, *args, **kwargs) -> None:
        print("ITERATION " + json.dumps({"seconds": time.perf_counter() - self.began, "generate": self.watch.seconds}), flush=True)
        print("DID " + json.dumps({"did": self.watch.did(), "result": self.watch.result()}), flush=True)
        self.wait()

    def wait(self) -> None:
        """Blocks until the driver says so; a driver that is gone ends the run."""
        if not sys.stdin.readline():
            raise SystemExit("the driver has ended")
        self.watch.clear()
        self.watch.read()
        self.began = time.perf_counter()


def main() -> None:
    """Runs the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["policy"], dtype=dtype) for _ in range(2))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(job["scorer"], dtype=dtype, num_labels=1) for _ in range(2))
    models = {"policy": policy, "reference": reference, "value": value, "reward": reward}
    watch, batch = Watch(job), len(job["prompts"])
    policy.generate = watch.generate(policy.generate, tokenizer)
    ppo_trainer.masked_mean, np.random.permutation = watch.masked_mean(ppo_trainer.masked_mean), watch.permutation(np.random.permutation)
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
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        kl_coef=0.05,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        logging_steps=10**6,
    )
    data = Dataset.from_dict({"input_ids": job["prompts"]})
    watch.trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Turns(watch)],
    )
    watch.trainer.optimizer.optimizer.register_step_pre_hook(watch.before_step)
    work = work_of(models, watch.trainer)
    facts = manifest("TRL", work, job["threads"], "cpu", warm_up=job["warm_up"], repeats=job["repeats"])
    facts.settings.update(settings_of(models, watch.trainer))
    print("MANIFEST " + json.dumps(vars(facts)), flush=True)
    watch.trainer.train()


def work_of(models: dict, trainer: PPOTrainer) -> dict:
    """What the manifest says of the work: the models as they were loaded, and the settings of the algorithm that change it."""
    optimizer, args = optimizer_facts(trainer.optimizer.param_groups), trainer.args
    return {
        "models": {role: model_facts(model) for role, model in models.items()},
        "optimizer": {"policy": optimizer, "value": optimizer},
        "epochs": args.num_ppo_epochs,
        "minibatches": args.num_mini_batches,
        "gamma": args.gamma,
        "lam": args.lam,
        "kl_coef": args.kl_coef,
        "clip": [args.cliprange],
        "value_clip": args.cliprange_value,
        "temperature": args.temperature,
        "whitens_advantages": True,  # always
        "whitens_rewards": args.whiten_rewards,
        "longest_completion": args.response_length,
    }


def settings_of(models: dict, trainer: PPOTrainer) -> dict:
    """How TRL does it, for the manifest."""
    return {
        "old_logprobs": "sampler",
        "master_weights": "none: the weights are trained in their own precision",
        "rows_per_forward": trainer.args.local_mini_batch_size,
        "attention": {role: model.config._attn_implementation for role, model in models.items()},
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "gradient_clip": 0.0,  # its PPO loop clips none
        "value_loss_share": trainer.args.vf_coef,
    }


if __name__ == "__main__":
    main()
