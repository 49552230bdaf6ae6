"""What a side did, in terms that both sides of a comparison can report; work that is unlike is refused.

Facts (`did`) must be equal. Results of an update are compared within tolerances: both sides train on the same tokens with the same weights,
but round differently, and TRL pays the score one place after the last token, so that its advantages and values count one place more a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SAMPLES = "samples.json"
"""In a job's folder: what `peers/ours_ppo.py` sampled last, and in which minibatches it trained on that."""
WORDS_FROM = 3
"""The first id of a word in `workload.word_tokenizer`."""
TOLERANCES: dict[str, tuple[float, float]] = {
    "surprise": (2e-3, 0.0),
    "score": (0.05, 0.02),
    "kl": (0.0, 1.0),
    "clipped": (0.0, 0.02),
    "policy_loss": (0.05, 0.1),
    "value_loss": (0.15, 0.005),
    "policy_gradient": (0.1, 0.0),
    "value_gradient": (0.2, 0.0),
}
"""Relative and absolute difference that a result may have. surprise: −Σ log-prob of a completion, mean over completions, in nats; score:
mean reward; kl: to the reference, nats a completion; clipped: share of clipped tokens; losses, and norms of
gradients before any clipping: of the first minibatch. Seen: 7 % in the value's two, 0.3 % in the policy's gradient and in the surprise.
Score and policy's loss are means around 0: they differed by up to 0.001 and by 0.06, the latter (of whitened advantages, whose deviation
is 1, in one minibatch) for the place that TRL adds."""


def digest(rows: Iterable[Sequence[int]]) -> str:
    """Of rows of tokens (or numbers) whose order does not matter."""
    return hashlib.sha256(repr(sorted(tuple(row) for row in rows)).encode()).hexdigest()[:16]


def model_facts(model: Any) -> dict[str, Any]:
    """Sizes, precision and initial weights of a Hugging Face model; of its weights the sum of their absolute values, in four digits."""
    config, parameters = model.config, list(model.parameters())
    return {
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "words": config.vocab_size,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        "weights": f"{sum(parameter.detach().abs().double().sum().item() for parameter in parameters):.4g}",
    }


def optimizer_facts(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of an AdamW, from its parameter groups; those in which groups differ are all listed."""
    found = {name: sorted({str(group[name]) for group in groups}) for name in ("betas", "eps", "weight_decay")}
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Facts in which two sides differ, each as a line; entries of mappings are looked at one by one."""
    lines: list[str] = []
    for name in sorted({*mine, *theirs}):
        one, other = mine.get(name, "not reported"), theirs.get(name, "not reported")
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += [f"{name}.{line}" for line in differences(one, other)]
        elif one != other:
            lines.append(f"{name} is {one!r} here and {other!r} there")
    return lines


def check_did(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Refuses an iteration in which two sides did not do the same.

    Where a special token was sampled among the others, TRL is given another word in its place (it would end the row), and results are not
    compared.

    Args:
        mine, theirs: `did`: facts that must be equal; `result`: numbers that must be alike, those that both sides report.

    Returns:
        Whether results were compared.

    Raises:
        ValueError: a fact differs, a result lies outside its tolerance, or there is no result that both report.
    """
    lines = differences(mine["did"], theirs["did"])
    shared = [name for name in mine["result"] if name in theirs["result"]]
    lines += [] if shared else ["no result is reported by both"]
    compared = not mine["did"]["special_tokens"]
    for name in shared if compared else ():
        one, other, (relative, absolute) = mine["result"][name], theirs["result"][name], TOLERANCES[name]
        if not abs(one - other) <= max(relative * max(abs(one), abs(other)), absolute):
            lines.append(f"{name} is {one:.6g} here and {other:.6g} there")
    if lines:
        raise ValueError("the two sides did not do the same: " + "; ".join(lines))
    return compared


def special_tokens(completions: Iterable[Sequence[int]]) -> int:
    """How many of the tokens are `<pad>`, `<s>` or `</s>` of `workload.word_tokenizer`."""
    return sum(token < WORDS_FROM for completion in completions for token in completion)
