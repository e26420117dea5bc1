"""Logits and their products by parts: chunks of rows, some columns, what a CPU's cache holds.

Shapes: N positions, R rows of a chunk, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits alive at once, 256 MiB in fp32. Larger chunks make faster matmuls, smaller ones need less memory.
CHUNK_LOGITS = 2**26
# Rows of the head that are cast to a narrower dtype at a time: all of them may be a gigabyte.
CAST_ROWS = 2**14
# Logits that a CPU works on at a time, 2 MiB in fp32: every pass over them but the first finds them in its cache.
CACHED_LOGITS = 2**19


def logit_chunks(
    hidden_ND: Tensor, weight_VD: Tensor, chunk_logits: int, factor: float = 1.0
) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of rows of like size, and their factor · h Wᵀ (R, V), which lies where the next chunk's is written.

    Of no rows at all there is one chunk of none.

    Args:
        hidden_ND: in the dtype in which to multiply; products are widened to fp32.
        weight_VD: the head's matrix.
        chunk_logits: most logits alive at once, but one row at least.
    """
    positions, vocabulary = len(hidden_ND), len(weight_VD)
    count = max(1, -(-positions // max(1, chunk_logits // vocabulary)))
    size = max(1, -(-positions // count))
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    room_RV = hidden_ND.new_empty(min(size, positions), vocabulary, dtype=wide)
    for start in range(0, max(1, positions), size):
        part = slice(start, min(start + size, positions))
        z_RV = room_RV[: part.stop - part.start]
        for columns in column_slices(vocabulary):
            write_product(z_RV[:, columns], hidden_ND[part], weight_VD[columns].to(hidden_ND.dtype).t(), factor=factor)
        yield part, z_RV


def cached_rows(logits_MV: Tensor) -> list[slice]:
    """Divide rows into parts to be worked on one after the other: on a CPU small ones, elsewhere all together."""
    rows, vocabulary = logits_MV.shape
    size = max(1, CACHED_LOGITS // vocabulary if logits_MV.device.type == "cpu" else rows)
    return [slice(start, start + size) for start in range(0, max(1, rows), size)]


def column_slices(vocabulary: int, most: int | None = None) -> list[slice]:
    """Divide the vocabulary into parts of `most` entries (`CAST_ROWS`) that are multiplied one after the other."""
    size = min(most or CAST_ROWS, CAST_ROWS)
    return [slice(start, start + size) for start in range(0, vocabulary, size)]


def write_product(total: Tensor, left: Tensor, right: Tensor, add: bool = False, factor: float = 1.0) -> None:
    """Write factor · left @ right to the total, of another dtype or the same, or add it there."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=1 if add else 0, alpha=factor, out=total)
    elif add:
        total.add_(left @ right, alpha=factor)
    else:
        torch.mul(left @ right, factor, out=total)


def sum_dtype(compute: torch.dtype) -> torch.dtype:
    """Return the dtype of factors that are summed over a vocabulary: fp16 ends at 65,504 and does not hold the sum."""
    return torch.float32 if compute == torch.float16 else compute


def working_bytes(positions: int, vocabulary: int, compute_bytes: int, buffers: int = 1) -> int:
    """Return the bytes of a chunk of logits, and of some columns in a narrower dtype.

    Args:
        positions: rows in all.
        vocabulary: rows of the head.
        compute_bytes: bytes of a number of the dtype that matmuls run in.
        buffers: chunks that live at once; a softcapped loss needs two, but on a CPU.
    """
    rows = min(positions, max(1, CHUNK_LOGITS // vocabulary))
    narrow = compute_bytes * min(vocabulary, CAST_ROWS) if compute_bytes < 4 else 0
    return rows * (4 * vocabulary * buffers + narrow)
