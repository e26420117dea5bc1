"""Whether greedy decoding would write exactly this answer, which lm-evaluation-harness asks beside a likelihood.

Greedy means one token a call and no temperature: of the masked tokens the one of which the model is surest is
committed. The first that is not the answer's settles the question, which is nearly always the first of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unmask.evaluation.likelihood import DEFAULT_BATCH_SIZE, Pair, mask_token_of
from unmask.models.registry import family_of
from unmask.sampling.backends.backend import backend_for
from unmask.sampling.engine.loop import denoise
from unmask.sampling.engine.state import Request, Template
from unmask.sampling.settings import settings_of


def greedily_written(model: Any, pairs: Sequence[Pair], batch_size: int | None = None) -> list[bool]:
    """Say for each pair of a prompt and an answer whether greedy decoding writes that answer, of known length.

    As in sampling, tokens that belong in no answer are never written; ties go to the lowest position.

    Args:
        model: from `unmask.load_model`, of a family with a mask token.
        pairs: token ids; an answer has at least one.
        batch_size: rows that the network sees at once; None = 16.
    """
    mask_token_of(model)
    settings = settings_of(family_of(model.config), steps=max((len(answer) for _, answer in pairs), default=1))
    order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))  # little padding
    requests = (
        Request(index, prompt, 0, Template([0] * len(answer), [True] * len(answer), [0] * len(answer)), answer)
        for index, (prompt, answer) in ((index, pairs[index]) for index in order)
    )
    written = [False] * len(pairs)
    for event in denoise(backend_for(model, settings), requests, settings, batch_size=batch_size or DEFAULT_BATCH_SIZE):
        for row in event.finished_B.nonzero()[:, 0].tolist():
            answer = event.answer_BC[row, : event.lengths[row]].tolist()
            written[event.rows[row]] = answer == list(pairs[event.rows[row]][1])
    return written
