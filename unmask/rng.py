"""Keyed randomness: every draw is a function of (seed, stream, epoch, sample), of nothing else.

A 128-bit BLAKE2b hash of the key seeds a counter-based Philox generator, so rank, batch size, accumulation and the
global generators never matter, and two streams never share numbers. torch's CPU generator would not do: it uses only
the low 32 bits of its seed. A draw of n numbers is a prefix of a longer one, so padding does not matter either.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def key(seed: int, stream: str, epoch: int = 0, sample: int = 0) -> int:
    """Return the 128-bit hash of a stream's full name."""
    name = f"{seed}\x1f{stream}\x1f{epoch}\x1f{sample}".encode()
    return int.from_bytes(blake2b(name, digest_size=16).digest(), "little")


def generator(seed: int, stream: str, epoch: int = 0, sample: int = 0) -> np.random.Generator:
    """Return a fresh Philox generator for one stream of one sample in one epoch."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream, epoch, sample)))


@dataclass(frozen=True)
class NoiseStream:
    """The noise of one run: draws for the rows of a batch, each from its own key.

    Attributes:
        seed: the run's seed.
        scope: separates uses that must not share noise, for example "train" and "validation".
    """

    seed: int
    scope: str = "train"

    def uniform(self, stream: str, epoch: int, sample_ids_B: Tensor, length: int) -> Tensor:
        """Draw U[0, 1) for each row from its own generator, float32 (B, length) on the CPU.

        Args:
            stream: name of the draw; different names are independent.
            sample_ids_B: int64, the rows' indices in their dataset.
        """
        name = f"{self.scope}/{stream}"
        rows = [
            generator(self.seed, name, epoch, sample).random(length, dtype=np.float32)
            for sample in sample_ids_B.tolist()
        ]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length)
