"""LLaDA's sampler as its authors published it, written plainly from that description: the baseline of what is faster.

Each step is a forward over prompt and answer with logits of every position, a softmax over all of them, and the quota's
most confident masked positions of the current block (ML-GSAI/LLaDA, generate.py, temperature 0, low_confidence; there
too the softmax is in the logits' dtype). Rows of one batch have prompts of one length, and no row ends early.

Shapes: B rows, P prompt positions, L = P + answer positions, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def published(model: Any, prompt_BP: Tensor, new_tokens: int, block_size: int, steps: int) -> tuple[Tensor, int]:
    """Return the answers, int64 (B, new_tokens), and how often the network was called.

    Args:
        model: has `model(ids)`, `model.logits(hidden)` and `model.config.mask_token_id`.
        prompt_BP: int64.
        new_tokens: a multiple of `block_size`.
        block_size: positions of a block.
        steps: calls for the whole answer, a multiple of the number of blocks.
    """
    mask, start = model.config.mask_token_id, prompt_BP.shape[1]
    ids_BL = torch.cat((prompt_BP, torch.full((len(prompt_BP), new_tokens), mask)), dim=1)
    blocks = new_tokens // block_size
    calls = 0
    for block in range(blocks):
        end = start + (block + 1) * block_size
        each, more = divmod(block_size, steps // blocks)
        for step in range(steps // blocks):
            masked_BL = ids_BL == mask
            logits_BLV = model.logits(model(ids_BL))
            calls += 1
            argmax_BL = logits_BLV.argmax(dim=-1)
            probability_BLV = torch.softmax(logits_BLV, dim=-1)
            confidence_BL = probability_BLV.gather(-1, argmax_BL[..., None])[..., 0]
            confidence_BL = torch.where(masked_BL, confidence_BL, -torch.inf)
            confidence_BL[:, end:] = -torch.inf
            for row, confidence_L in enumerate(confidence_BL):
                committed = confidence_L.topk(each + (step < more)).indices
                ids_BL[row, committed] = argmax_BL[row, committed]
    return ids_BL[:, start:], calls
