"""Laws 3 and 8 at the start of every run, and law 3 in the first minibatch of every step: on policy, the ratio is 1 and the KL is 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.group import WorkerGroup
from rlhf_dist.contracts.roles import PolicyRole, RatioInfo
from rlhf_dist.contracts.tally import merged
from rlhf_dist.coordinator.judging import raw_rewards
from rlhf_dist.coordinator.shards import Batch, Groups, Shard, collect_rollouts, collect_scores, generate, score

PROBE_TOKENS = 16
PROBE_STEP = 2**31 - 1  # keys random numbers that no training step uses

CAUSES = {
    "ratio": "padding reaches attention or positions, dropout is on, or a kernel depends on the batch",
    "sampler": "the sampler has other weights, another temperature or other positions than the trainer, "
    "or its cache does not fit this architecture",
    "sampled": "the sampler's log-probs are not near enough to the trainer's to be the old ones: set algorithm.old_logprobs=recompute",
    "reference": "reference and policy are loaded differently (attention kernel, remote code), the folder changed while the run started, "
    "or an adapter does not start as the identity",
}


@dataclass(frozen=True)
class Tolerance:
    """Limits of law 3 over tokens: |ρ − 1| and |k1| (`ratio`), the log-prob gap (`sampler`), each on mean and maximum; the clip fraction.

    The mean tells: what goes wrong moves it by orders of magnitude. Rounding alone has a tail (1.2e-5 in fp32 on unlikely tokens of a tiny
    model), so the maximum is held loosely, and in half precision, where padding alone moves logits, not at all. There the sampler's kernels
    round otherwise than the trainer's: on stories15M and 260K a probe's mean gap is 0.015, at most 0.033 of 240 probes, vLLM's 0.013;
    a forgotten temperature makes 0.2.
    """

    ratio: tuple[float, float]
    sampler: tuple[float, float]
    clipped: float

    @staticmethod
    def of(dtype: str) -> Tolerance:
        """The limits at a precision (DESIGN, law 3)."""
        if dtype == "fp32":
            return Tolerance(ratio=(1e-5, 1e-3), sampler=(1e-4, 1e-2), clipped=0.0)
        return Tolerance(ratio=(5e-3, math.inf), sampler=(5e-2, math.inf), clipped=1e-3)


def preflight(config: PPOConfig, groups: Groups, version: int) -> dict[str, float]:
    """Samples a few prompts and compares sampler, trainer and reference; value and rewards judge the samples too.

    A reward may abstain on the short probes; it must not fail.

    Returns:
        The gaps that were seen, as metrics.

    Raises:
        UserError: a breach, with its likely causes; or a reward's own fault.
    """
    prompts = min(config.rollout.prompts_per_step, 2 * max(groups.policy.world_size, groups.sampler.world_size))
    limit = min(PROBE_TOKENS, config.rollout.max_new_tokens)
    groups.turn(groups.sampler, needs="sampler")
    shards = generate(groups.sampler, Batch("train", PROBE_STEP, 0, prompts, 1, limit), version, 1)
    score(groups, shards, with_value=True)
    collect_rollouts(groups.sampler, shards)
    check_versions(shards, version)
    collect_scores(groups, shards)
    for shard in shards:
        raw_rewards(shard)
    seen = merged(info.tally for info in _ratio_checks(groups.policy, shards)).means()
    check_gaps(seen, config.policy.dtype, same_reference=version == 0 and reference_is_policy(config))
    return {f"preflight/{name}": value for name, value in seen.items()}


def reference_is_policy(config: PPOConfig) -> bool:
    """Whether the reference starts as the very policy, at the same precision: then KL at step 0 must be 0."""
    return config.reference.model in ("", config.policy.model) and (
        config.policy.lora is not None
        or (config.reference.dtype, config.reference.quantize) == (config.policy.dtype, config.policy.quantize)
    )


def check_versions(shards: Sequence[Shard], version: int) -> None:
    """Law 8: what was sampled says that it is of the version that was synced (whose checksum the ranks have agreed on).

    Raises:
        UserError: it does not.
    """
    found = sorted({each for shard in shards if shard.info is not None for each in shard.info.versions} - {version})
    if found:
        fix = "the sampler was not given the trainer's weights: report this with the config"
        what = f"the sampler's completions are of policy version {', '.join(map(str, found))}, the trainer holds version {version}"
        raise UserError(what, where="preflight (law 8, policy versions)", fix=fix)


def check_gaps(seen: dict[str, float], dtype: str, *, same_reference: bool) -> None:
    """Holds what preflight saw to the tolerance of the precision.

    Raises:
        UserError: a gap is too large.
    """
    limit = Tolerance.of(dtype)
    limits = {"ratio": limit.ratio, "sampler": limit.sampler} | ({"reference": limit.ratio} if same_reference else {})
    for name, allowed in limits.items():
        found = _beyond({"mean": seen[f"{name}/mean"], "largest": seen[f"{name}/max"]}, {"mean": allowed[0], "largest": allowed[1]})
        if found:
            raise _breach(name, f"{found} in {dtype}", "preflight (law 3, on-policy identity)")


def check_first_minibatch(first: dict[str, float], dtype: str, step: int, *, sampled: bool = False) -> None:
    """Ratio 1 and clip fraction 0 in the first minibatch of the first epoch.

    Args:
        first: metrics of the policy's first minibatch; empty where the step trained the value model alone.
        dtype: the policy's precision.
        step: from 0.
        sampled: the old log-probs are the sampler's, so that the ratio is also the gap between sampler and trainer.

    Raises:
        UserError: a breach.
    """
    if not first:
        return
    limit = Tolerance.of(dtype)
    found = _beyond(
        {
            "mean |ρ − 1|": first["val/ratio_mean_deviation"],
            "largest |ρ − 1|": first["val/ratio_max_deviation"],
            "clip fraction": first["policy/clipfrac_avg"],
        },
        {"mean |ρ − 1|": limit.ratio[0], "largest |ρ − 1|": limit.ratio[1], "clip fraction": limit.clipped},
    )
    if found:
        where = f"step {step + 1}, first minibatch (law 3, on-policy identity)"
        raise _breach("sampled" if sampled else "ratio", f"{found} in {dtype}", where)


def _beyond(seen: Mapping[str, float], allowed: Mapping[str, float]) -> str:
    """The figures that are not within their limits (NaN never is), in words."""
    return ", ".join(f"{name} {value:.3g} (allowed {allowed[name]:g})" for name, value in seen.items() if not value <= allowed[name])


def _ratio_checks(policy: WorkerGroup, shards: Sequence[Shard]) -> list[RatioInfo]:
    infos: list[RatioInfo] = []
    for shard in shards:
        infos += policy.collect(policy.submit(PolicyRole.ratio_check, [(shard.rollouts, shard.pieces)] * policy.world_size))
    return infos


def _breach(name: str, seen: str, where: str) -> UserError:
    titles = {
        "ratio": "the policy disagrees with itself",
        "sampler": "sampler and trainer disagree",
        "sampled": "sampler and trainer disagree",
        "reference": "KL to the reference is not 0 at step 0",
    }
    return UserError(f"{titles[name]}: {seen}", where=where, fix=f"likely causes: {CAUSES[name]}")
