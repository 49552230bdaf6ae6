"""Philox4x32-10: random numbers as a pure function of a counter and a key, so that a sample does not depend on who draws it, or when.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MANTISSA = 23


def stream_key(seed: int, stream: str, step: int) -> int:
    """A stable 64-bit hash of a run's seed, a stream's name and a step."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox on four 32-bit words held in int64 tensors (any device, broadcastable shapes).

    Args:
        counter: four int64 tensors, each value in [0, 2**32).
        key: 64 bits; its low word is Random123's first key word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32 & WORD
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def uniforms(
    key: int, prompt_ids: Sequence[int], sample_indices: Sequence[int], max_new_tokens: int, device: torch.device | str = "cpu"
) -> Tensor:
    """One uniform number per token: float32 [rows, max_new_tokens], in the open interval (0, 1).

    Entry [i, t] depends on the key, on prompt_ids[i] (64 bits, signed or not), on sample_indices[i] and on t alone.
    23 bits are kept: k + ½ is then exact in float32, so that neither 0 nor 1 can come out.
    """
    rows = [[sample & WORD, prompt & WORD, prompt >> 32 & WORD] for prompt, sample in zip(prompt_ids, sample_indices, strict=True)]
    sample, low, high = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 3).T[:, :, None]
    token = torch.arange(max_new_tokens, dtype=torch.int64, device=device)[None, :]
    word = philox4x32((token, sample, low, high), key)[0].expand(len(rows), max_new_tokens)
    return ((word >> 32 - MANTISSA).float() + 0.5) / 2**MANTISSA


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 × 32 bit product. int64 wraps around and keeps all bits; the mask removes the sign that >> drags in."""
    product = word * constant
    return product >> 32 & WORD, product & WORD
