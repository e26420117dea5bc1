"""How well the text behind a blank goes with what was written into it: what tells one length of a blank from another.

The tokens of a blank alone do not tell. A blank that is too short is easily filled with what begins like the right
words, and every token of it is probable; that what follows does not go on from there is not their fault. So what
follows is asked for as well.

Shapes: C answer columns, M asked positions, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.sampling.backends.backend import Backend, Call


def columns_behind(spans: Sequence[tuple[int, int]], length: int, most: int) -> list[int]:
    """Return the given columns right behind each blank, at most `most` of each, up to the next blank or the end.

    Args:
        spans: of each blank, its columns [start, end), in order.
        length: columns of the whole.
        most: at least 1.
    """
    ends = [start for start, _ in spans[1:]] + [length]
    return [column for (_, end), stop in zip(spans, ends, strict=True) for column in range(end, min(end + most, stop))]


@torch.no_grad()
def log_probabilities(
    adapter: Backend, prompt_ids: Sequence[int], answer: Sequence[int], columns: Sequence[int]
) -> list[float]:
    """Return log p, in nats, of the tokens at some columns where all of these are masked and the rest is seen.

    One full forward; each token's probability is by itself, as softmax(logits) over the vocabulary, in fp32.

    Args:
        adapter: of a family with masks.
        prompt_ids: tokens before the answer.
        answer: its tokens, nothing open.
        columns: at least one.
    """
    spec = adapter.spec
    assert spec.mask_id is not None
    asked_M = torch.tensor(columns)
    answer_1C = torch.tensor([list(answer)])
    token_M = answer_1C[0, asked_M]
    zero_1 = torch.zeros(1, dtype=torch.long)
    call = Call(
        answer_BC=answer_1C.index_fill(1, asked_M, spec.mask_id),
        lengths=(len(answer),),
        block_B=zero_1,
        first_B=zero_1,
        end_B=zero_1 + len(answer),
        step_B=zero_1,
        rows_M=torch.zeros_like(asked_M),
        positions_M=asked_M - spec.logit_shift,
    )
    hidden_MD, _ = adapter.denoise(adapter.prefill([prompt_ids]), call)
    logs_MV = adapter.logits(hidden_MD)[:, : spec.vocab_size].float().log_softmax(dim=-1)
    return logs_MV.gather(1, token_M[:, None].to(logs_MV.device))[:, 0].tolist()
