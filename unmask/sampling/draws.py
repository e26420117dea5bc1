"""Random numbers for sampling: each is a function of (row's key, call, position, index), of nothing else.

A generator that hands out numbers in order would make a row's draws depend on what was drawn before; a counter-based
one does not. SplitMix64 (Steele, Lea & Flood 2014, fig. 14) is one multiply-and-shift hash a number, so a whole batch
is drawn by a few tensor operations, with the same bits on every device.

Shapes: M open positions, N numbers a position.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor

from unmask import rng

# Names of the draws of one network call; different streams are independent.
CANDIDATES, ORDER = 1, 2


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
    seen: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        name = blake2b(b"".join(token.to_bytes(8, "little") for token in prompt), digest_size=16).hexdigest()
        count = seen[name] = seen.get(name, -1) + 1
        keys.append(_signed(rng.key(seed, f"sampling/{name}", sample=count)))
    return keys


def position_keys(keys_M: Tensor, stream: int, calls_M: Tensor, positions_M: Tensor) -> Tensor:
    """Return int64 (M,): the key of each position's own numbers in one stream of one network call.

    Args:
        keys_M: int64 (M,), the key of the row that each position stands in.
        stream: `CANDIDATES` or `ORDER`.
        calls_M: int64 (M,), number of the row's network call.
        positions_M: int64 (M,), index within the answer.
    """
    keys_M = _scramble(keys_M.clone())
    for part in (stream, calls_M, positions_M):
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


def _shift_(bits: Tensor, places: int) -> Tensor:
    """Shift right in place, filling with zeros (int64's own shift repeats the sign)."""
    return bits.bitwise_right_shift_(places).bitwise_and_((1 << (64 - places)) - 1)


def _scramble(bits: Tensor) -> Tensor:
    """Hash each int64 in place (SplitMix64's finaliser); multiplication wraps around at 2^64."""
    bits.bitwise_xor_(_shift_(bits.clone(), 30)).mul_(_FIRST)
    bits.bitwise_xor_(_shift_(bits.clone(), 27)).mul_(_SECOND)
    return bits.bitwise_xor_(_shift_(bits.clone(), 31))
