"""Law 3 at the start of every run, and in the first minibatch of every step: on policy, the ratio is 1 and the KL is 0."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.roles import PolicyRole, RatioInfo
from rlhf_dist.contracts.tally import merged
from rlhf_dist.coordinator.judging import judge
from rlhf_dist.coordinator.shards import Batch, Groups, collect_rollouts, collect_scores, generate, score
from rlhf_dist.rewards.mixture import RewardMixer

PROBE_TOKENS = 16
PROBE_STEP = 2**31 - 1  # keys random numbers that no training step uses

CAUSES = {
    "ratio": "padding reaches attention or positions, dropout is on, or a kernel depends on the batch",
    "sampler": "the sampler has other weights, another temperature or other positions than the trainer, or its cache does not fit this architecture",
    "reference": "the reference is another checkpoint or loads in another precision than the policy",
}


@dataclass(frozen=True)
class Tolerance:
    """Limits of law 3 on |ρ − 1|, |log-prob gap| and |k1|. fp32 bounds the largest token; half precision, where padding alone moves logits, the mean."""

    ratio: float
    sampler: float
    statistic: str

    @staticmethod
    def of(dtype: str) -> Tolerance:
        """The limits at a precision (DESIGN, law 3)."""
        return Tolerance(1e-5, 1e-4, "max") if dtype == "fp32" else Tolerance(5e-3, 2e-2, "mean")


def preflight(config: PPOConfig, groups: Groups, version: int) -> dict[str, float]:
    """Samples a few prompts and compares sampler, trainer and reference; all rewards judge the samples too.

    Returns:
        The gaps that were seen, as metrics.

    Raises:
        UserError: a breach, with its likely causes; or a reward's own fault.
    """
    prompts = min(config.rollout.prompts_per_step, 2 * groups.policy.world_size)
    limit = min(PROBE_TOKENS, config.rollout.max_new_tokens)
    shards = generate(groups.policy, Batch("train", PROBE_STEP, 0, prompts, 1, limit), version, 1)
    score(groups, shards, with_value=True)
    collect_rollouts(groups.policy, shards)
    collect_scores(groups, shards)
    judge(RewardMixer(config.reward, config.rollout.max_new_tokens), shards, 1, update=False)
    infos: list[RatioInfo] = []
    for shard in shards:
        handles = groups.policy.submit(PolicyRole.ratio_check, [(shard.rollouts, shard.pieces)] * groups.policy.world_size)
        infos += groups.policy.collect(handles)
    seen = merged(info.tally for info in infos).means()
    check_gaps(seen, config.policy.dtype, same_reference=reference_is_policy(config))
    return {f"preflight/{name}": value for name, value in seen.items()}


def reference_is_policy(config: PPOConfig) -> bool:
    """Whether the reference starts as the very policy, at the same precision: then KL at step 0 must be 0."""
    return config.reference.model in ("", config.policy.model) and (config.policy.lora is not None or config.reference.dtype == config.policy.dtype)


def check_gaps(seen: dict[str, float], dtype: str, *, same_reference: bool) -> None:
    """Holds what preflight saw to the tolerance of the precision.

    Raises:
        UserError: a gap is too large.
    """
    limit = Tolerance.of(dtype)
    limits = {"ratio": limit.ratio, "sampler": limit.sampler} | ({"reference": limit.ratio} if same_reference else {})
    for name, allowed in limits.items():
        gap = seen[f"{name}/{limit.statistic}"]
        if not gap <= allowed:
            raise _breach(name, f"{limit.statistic} {gap:.3g}, allowed {allowed:g} in {dtype}", "preflight (law 3, on-policy identity)")


def check_first_minibatch(first: dict[str, float], dtype: str, step: int) -> None:
    """Ratio 1 and clip fraction 0 in the first minibatch of the first epoch.

    Raises:
        UserError: a breach.
    """
    where = f"step {step + 1}, first minibatch (law 3, on-policy identity)"
    if dtype == "fp32":
        if not first["val/ratio_max_deviation"] <= 1e-5:
            raise _breach("ratio", f"max |ρ − 1| {first['val/ratio_max_deviation']:.3g}, allowed 1e-05 in fp32", where)
    elif not (abs(first["val/ratio"] - 1) <= 5e-3 and first["policy/clipfrac_avg"] <= 1e-3):
        raise _breach("ratio", f"ratio {first['val/ratio']:.5f}, clip fraction {first['policy/clipfrac_avg']:.5f} in {dtype}", where)


def _breach(name: str, seen: str, where: str) -> UserError:
    titles = {"ratio": "the policy disagrees with itself", "sampler": "sampler and trainer disagree", "reference": "KL to the reference is not 0 at step 0"}
    return UserError(f"{titles[name]}: {seen}", where=where, fix=f"likely causes: {CAUSES[name]}")
