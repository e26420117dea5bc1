"""Whether greedy decoding would write exactly this answer, which lm-evaluation-harness asks beside a likelihood.

Greedy means: of the masked tokens the one of which the model is surest is settled, until none is left (LLaDA's sampler
with one token a step and no temperature). The first that is not the answer's settles the question, which is nearly
always the first of all.

Shapes: B answers still open, N masked positions of a batch, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.evaluation.likelihood import DEFAULT_BATCH_SIZE, Pair, mask_token_of

# Logits alive at once; 2^26 in fp32 are 256 MiB.
_CHUNK_LOGITS = 2**26


@torch.no_grad()
def greedily_written(model: Any, pairs: Sequence[Pair], batch_size: int | None = None) -> list[bool]:
    """Say for each pair of a prompt and an answer whether greedy decoding writes that answer, of known length.

    As in sampling, the mask and rows of the embedding that are no token are never written; ties go to the lowest
    position.

    Args:
        model: from `unmask.load_model`, of a family with a mask token.
        pairs: token ids; an answer has at least one.
        batch_size: rows that the network sees at once; None = 16.
    """
    mask_id, size = mask_token_of(model), batch_size or DEFAULT_BATCH_SIZE
    clean = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    hidden = [torch.arange(len(ids)) >= len(prompt) for ids, (prompt, _) in zip(clean, pairs, strict=True)]
    written = [True] * len(pairs)
    open_rows = sorted(range(len(pairs)), key=lambda index: len(clean[index]))
    while open_rows:
        for start in range(0, len(open_rows), size):
            rows = open_rows[start : start + size]
            for row, (position, token) in zip(rows, _surest(model, rows, clean, hidden, mask_id), strict=True):
                hidden[row][position] = False
                written[row] = int(clean[row][position]) == token
        open_rows = [row for row in open_rows if written[row] and bool(hidden[row].any())]
    return written


def _surest(
    model: Any, rows: Sequence[int], clean: Sequence[Tensor], hidden: Sequence[Tensor], mask_id: int
) -> list[tuple[int, int]]:
    """Return for each row the masked position that the model is surest of, and the token that it puts there."""
    device = next(model.parameters()).device
    width = max(len(clean[row]) for row in rows)
    ids_BL = torch.zeros(len(rows), width, dtype=torch.int64)
    attends_BL = torch.zeros(len(rows), width, dtype=torch.bool)
    masked_BL = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        end = len(clean[row])
        ids_BL[place, :end] = clean[row].masked_fill(hidden[row], mask_id)
        attends_BL[place, :end] = True
        masked_BL[place, :end] = hidden[row]
    hidden_BLD = model(ids_BL.to(device), None if bool(attends_BL.all()) else attends_BL.to(device))
    masked_ND = hidden_BLD.flatten(0, 1)[masked_BL.flatten().nonzero()[:, 0].to(device)]
    sure_N, token_N = [], []
    for part_ND in masked_ND.split(max(1, _CHUNK_LOGITS // model.config.rows)):
        logits = model.logits(part_ND).float()
        logits[:, mask_id] = -torch.inf
        logits[:, model.config.vocab_size :] = -torch.inf
        best = logits.softmax(dim=-1).max(dim=-1)
        sure_N.append(best.values.cpu())
        token_N.append(best.indices.cpu())
    sure_BL = torch.full(masked_BL.shape, -1.0).masked_scatter(masked_BL, torch.cat(sure_N))
    token_BL = torch.zeros(masked_BL.shape, dtype=torch.int64).masked_scatter(masked_BL, torch.cat(token_N))
    best_B = sure_BL.argmax(dim=1).tolist()
    return [(position, int(token_BL[place, position])) for place, position in enumerate(best_B)]
