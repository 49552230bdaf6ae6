"""Everything that can be found wrong before a process is started: seconds, no weights loaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.rewards import FailureRules
from rlhf_dist.data.files import iter_rows, place
from rlhf_dist.data.prompts import CHECK_ROWS, PromptStream, check_prompts
from rlhf_dist.data.records import columns_of
from rlhf_dist.models.loading import check_loadable, context_length, load_config, load_tokenizer, stop_tokens, tokenizer_folder
from rlhf_dist.rewards.guard import longest_judging_s
from rlhf_dist.rewards.probe import probe
from rlhf_dist.rewards.sources import guarded
from rlhf_dist.runs.rollout_state import check_column
from rlhf_dist.workers.roles import needed_roles, section_of

PROBE_ROWS = 2


def check_run(config: PPOConfig) -> dict[str, Any]:
    """Checks DeepSpeed files, models, data and rewards of a config.

    Returns:
        Facts worth showing.

    Raises:
        UserError: the first fault.
    """
    _check_engines(config)
    tokenizer = _check_models(config)
    counts = check_prompts(config.data, tokenizer)
    if config.rollout.max_staleness:
        _check_columns(config)
    _check_rewards(config, tokenizer)
    stops = stop_tokens(config.policy.model, tokenizer, trust_remote_code=config.policy.trust_remote_code)
    rewards = "+".join(source.name for source in config.reward.sources)
    return {"rewards": rewards, "stop tokens": list(stops), "prompts looked at": {split: c.accepted for split, c in counts.items()}}


def _check_engines(config: PPOConfig) -> None:
    trained = {"policy": config.policy.optim.clip_norm, "value": config.value.optim.clip_norm}
    for role in needed_roles(config):
        check_engine(role, section_of(config, role), config.placement.launcher, trained=trained.get(role))


def check_engine(role: str, section: EngineSection, launcher: str, *, trained: float | None) -> None:
    """A role's DeepSpeed file and precision.

    Args:
        role: as the config names it. section: its section. launcher: ray or spmd. trained: gradient clip, None for a frozen engine.

    Raises:
        UserError: a file that contradicts the config, or fp16 on a CPU.
    """
    resolve_deepspeed(section.deepspeed, dtype=section.dtype, clip_norm=trained or 0.0, trains=trained is not None)
    if section.dtype == "fp16" and not _has_gpu(section, launcher):
        raise UserError("DeepSpeed refuses fp16 on a CPU", where=f"{role}.dtype", fix=f"use bf16 or fp32, or give {role} a GPU")


def check_quantisation(role: str, section: EngineSection, path: str, *, classifier: bool = False) -> None:
    """Whether an adapter given as a model fits its base, and whether the model's layers can be held in 4 bits; no weights are loaded.

    Args:
        role: as the config names it. section: its section. path: the model. classifier: loaded as a sequence classifier.

    Raises:
        UserError: an adapter made for another base model; a layer that cannot be quantised where the engine will be.
    """
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    on_gpu = section.gpus_per_rank > 0 or torch.cuda.is_available()
    try:
        check_loadable(kind, section, path, on_gpu=on_gpu)
    except UserError as error:
        raise UserError(error.what, where=f"{role}: {error.where}", fix=error.fix) from error


def _has_gpu(section: EngineSection, launcher: str) -> bool:
    """Ray's ranks see the GPUs they ask for; those of the deepspeed launcher see what this machine has."""
    return section.gpus_per_rank > 0 if launcher == "ray" else torch.cuda.is_available()


def _check_models(config: PPOConfig) -> PreTrainedTokenizerBase:
    limit = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    paths = {role: getattr(section_of(config, role), "model", "") for role in needed_roles(config)}
    for role, path in paths.items():
        if not path:  # the initial policy
            continue
        context = context_length(load_config(path, trust_remote_code=getattr(config, role).trust_remote_code))
        if context is not None and limit > context:
            raise UserError(
                f"prompts of up to {config.data.max_prompt_tokens} tokens and completions of up to {config.rollout.max_new_tokens} "
                f"need {limit} positions; the {role} model has {context}",
                where="data.max_prompt_tokens, rollout.max_new_tokens",
                fix=f"lower one of them: their sum may be {context} at most",
            )
    tokenizer = load_tokenizer(config.policy.model, trust_remote_code=config.policy.trust_remote_code)
    for role, path in paths.items():
        if path and path != config.policy.model:
            check_vocabulary(role, path, tokenizer, trust_remote_code=getattr(config, role).trust_remote_code)
    for role in needed_roles(config):
        if role != "reward":
            check_quantisation(role, section_of(config, role), paths[role] or config.policy.model, classifier=role == "value")
    for source in config.reward.sources:
        if source.kind == "model":
            check_quantisation(f"reward {source.name}", config.reward, source.model, classifier=True)
            load_config(source.model, trust_remote_code=config.reward.trust_remote_code)
            load_tokenizer(source.model, trust_remote_code=config.reward.trust_remote_code)
    return tokenizer


def check_context(role: str, path: str, max_tokens: int, *, trust_remote_code: bool) -> None:
    """The rows of a supervised stage fit the model.

    Raises:
        UserError: no such model, or one whose context is shorter than `data.max_tokens`.
    """
    context = context_length(load_config(path, trust_remote_code=trust_remote_code))
    if context is not None and max_tokens > context:
        raise UserError(
            f"rows of up to {max_tokens} tokens do not fit the {role}'s context of {context}",
            where="data.max_tokens",
            fix=f"set data.max_tokens={context} or less, and data.overlong for rows that are longer",
        )


def check_vocabulary(role: str, path: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool, trained: str = "policy") -> None:
    """A model beside the trained one (reference, value model) reads its token ids.

    Args:
        role: as the config names it. path: the model. tokenizer: of the trained model. trained: section of the trained model.

    Raises:
        UserError: no such model, or one that knows fewer tokens, or other ones.
    """
    model = load_config(path, trust_remote_code=trust_remote_code)
    where, fix = f"{role}.model", f"give a {role} model that was trained with the tokenizer of {trained}.model"
    known = model.get_text_config().vocab_size
    if known < len(tokenizer):
        raise UserError(
            f"the {role} model knows {known} tokens, the tokenizer of {trained}.model has {len(tokenizer)}", where=where, fix=fix
        )
    if any((Path(tokenizer_folder(path)) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        own = load_tokenizer(path, trust_remote_code=trust_remote_code)
        theirs, ours = ({number: token for token, number in each.get_vocab().items()} for each in (own, tokenizer))
        if any(theirs[number] != ours[number] for number in theirs.keys() & ours.keys()):  # one of them may have added a pad, say
            raise UserError(f"the {role} model has another vocabulary than {trained}.model", where=where, fix=fix)


def _check_columns(config: PPOConfig) -> None:
    """Rollouts that wait for their step go into checkpoints with their data columns; the first save, hours later, is late to refuse one.

    Looks at the first rows of each file, as `check_prompts` does.
    """
    prompt = config.data.prompt_field
    for path in config.data.train:
        for number, row in itertools.islice(iter_rows(path, text_columns=(prompt,)), CHECK_ROWS):
            for name in row.keys() - {prompt}:
                check_column(name, (row[name],), where=place(path, number))


def _check_rewards(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    sources = [source for source in config.reward.sources if isinstance(source, FailureRules)]
    if not sources:
        return
    for source in sources:
        _check_time(source, config.placement.call_timeout_s)
    records = PromptStream(config.data, tokenizer, split="train", seed=config.run.seed).batch(0, PROBE_ROWS)
    for source in sources:
        reward = guarded(source)
        try:
            probe(reward, [record.text for record in records], columns_of(records))
        finally:
            reward.close()


def _check_time(source: FailureRules, call_timeout_s: float) -> None:
    """A reward's own rules must come to an end before the run gives the rank up."""
    longest = longest_judging_s(source)
    if longest >= call_timeout_s:
        raise UserError(
            f"reward {source.name!r} may take {longest:g} s, repetitions included; a rank silent for {call_timeout_s:g} s is given up",
            where=f"reward.sources, {source.name}: timeout_s, retries",
            fix="lower them, or raise placement.call_timeout_s",
        )
