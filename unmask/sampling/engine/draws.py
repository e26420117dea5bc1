"""Random numbers for sampling: each is a function of (row's key, call, position, index), of nothing else.

A generator that hands out numbers in order would make a row's draws depend on what was drawn before; a counter-based
one does not. SplitMix64 (Steele, Lea & Flood 2014, fig. 14) is one multiply-and-shift hash a number, so a whole batch
is drawn by a few tensor operations, with the same bits on every device.

Shapes: M positions, N numbers a position, V vocabulary rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from unmask import rng
from unmask.ops.categorical import categorical
from unmask.sampling.engine.state import Positions

# Names of the draws of one network call; different streams are independent.
TOKENS, ORDER, NOISE = 1, 2, 3


class Draws(Protocol):
    """Where the denoising loop gets its random numbers; for logits, on the device of the logits."""

    def gumbel(self, positions: Positions, logits_MV: Tensor) -> Tensor:
        """Return standard Gumbel noise for logits, float64 (M, V)."""
        ...

    def order(self, positions: Positions, logits_MV: Tensor) -> Tensor:
        """Return a number a position, uniform on (0, 1), float64 (M,)."""
        ...

    def category(self, positions: Positions, weights_MV: Tensor) -> Tensor:
        """Return a token a position, int64 (M,), each with a probability proportional to its weight (M, V)."""
        ...

    def noise(self, positions: Positions, vocab_size: int) -> Tensor:
        """Return a token a position, uniform over the vocabulary, int64 (M,) on the CPU.

        Called for whole canvases: once before a row's first call and after each call.
        """
        ...


class KeyedDraws:
    """`Draws` that depend on (row's key, call, position) alone, so on no neighbour and no order."""

    def gumbel(self, positions: Positions, logits_MV: Tensor) -> Tensor:
        return gumbel(position_keys(positions, TOKENS), logits_MV.shape[1])

    def order(self, positions: Positions, logits_MV: Tensor) -> Tensor:
        return uniform(position_keys(positions, ORDER), 1)[:, 0]

    def category(self, positions: Positions, weights_MV: Tensor) -> Tensor:
        return categorical(weights_MV, uniform(position_keys(positions, TOKENS), 1)[:, 0])

    def noise(self, positions: Positions, vocab_size: int) -> Tensor:
        return (uniform(position_keys(positions, NOISE), 1)[:, 0] * vocab_size).long()


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits as an unsigned number."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def row_keys(seed: int, prompts: Iterable[list[int]]) -> list[int]:
    """Return a key for each prompt: a hash of the seed, the prompt's tokens and how often it came before in the list.

    So a prompt draws the same numbers alone and in any batch and order, and one given twice gets two answers.
    """
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        name = blake2b(b"".join(token.to_bytes(8, "little") for token in prompt), digest_size=16).hexdigest()
        keys.append(_signed(rng.key(seed, f"sampling/{name}", sample=seen[name])))
        seen[name] += 1
    return keys


def position_keys(positions: Positions, stream: int) -> Tensor:
    """Return int64 (M,): the key of each position's numbers in one stream, such as `TOKENS`, of one network call."""
    keys_M = _scramble(positions.key_M.clone())
    for part in (stream, positions.call_M, positions.column_M):
        keys_M = _scramble((keys_M + part).mul_(_GOLDEN))
    return keys_M


def uniform(keys_M: Tensor, numbers: int) -> Tensor:
    """Return float64 (M, numbers), each uniform on the open interval (0, 1), on the device of the keys."""
    counters_N = torch.arange(1, numbers + 1, device=keys_M.device).mul_(_GOLDEN)
    bits_MN = _scramble(keys_M[:, None] + counters_N)
    # 52 bits and a half: both ends stay representable and are never reached.
    return _shift_(bits_MN, 12).double().add_(0.5).mul_(2.0**-52)


def gumbel(keys_M: Tensor, numbers: int) -> Tensor:
    """Return float64 (M, numbers) of standard Gumbel noise, -log(-log u)."""
    return uniform(keys_M, numbers).log_().neg_().log_().neg_()


def _shift_(bits: Tensor, count: int) -> Tensor:
    """Shift right in place, filling with zeros (int64's own shift repeats the sign)."""
    return bits.bitwise_right_shift_(count).bitwise_and_((1 << (64 - count)) - 1)


def _scramble(bits: Tensor) -> Tensor:
    """Hash each int64 in place (SplitMix64's finaliser); multiplication wraps around at 2^64."""
    bits.bitwise_xor_(_shift_(bits.clone(), 30)).mul_(_FIRST)
    bits.bitwise_xor_(_shift_(bits.clone(), 27)).mul_(_SECOND)
    return bits.bitwise_xor_(_shift_(bits.clone(), 31))
