"""Filling blanks in a text: what is given stays, token for token, and is seen on both sides of a blank.

Shapes: B rows, C answer columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unmask.config.sampler import SamplerConfig
from unmask.sampling.blanks import BlankText, encode_blanks
from unmask.sampling.engine.draws import row_keys
from unmask.sampling.engine.loop import StepEvent
from unmask.sampling.engine.state import Request
from unmask.sampling.generate import Stats, rows_of
from unmask.sampling.jobs import LoadedModel, as_loaded
from unmask.sampling.plan import check_blank_sampler
from unmask.sampling.prompts import as_list, labels_of
from unmask.sampling.text import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Infill:
    """A text with its blanks filled.

    Attributes:
        token_ids: the whole text, without what was put before or behind it (a chat's turns, a start of text).
        text: the given text as it was given, with the fills in it.
        fills: the text of each blank: what its tokens add to that of all tokens before, without special tokens.
        fill_ids: the tokens of each blank.
        log_likelihood: mean over the filled tokens of the log-probability, in nats, that the model gave each in the
            call that committed it (or wrote over it: `revise` edit; of a canvas: its last), at temperature 1.
        prompt_ids: what stands before the text.
        stats: what it cost; tokens are the filled ones.
    """

    token_ids: list[int]
    text: str
    fills: list[str]
    fill_ids: list[list[int]]
    log_likelihood: float
    prompt_ids: list[int]
    stats: Stats


def infill(
    model: nn.Module,
    texts: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sampler: SamplerConfig | None = None,
    seed: int = 42,
    raw: bool = False,
    batch_size: int | None = None,
    on_event: Callable[[StepEvent], None] | None = None,
    on_answer: Callable[[int, Infill], None] | None = None,
    labels: Sequence[str] | None = None,
) -> list[Infill]:
    """Fill the blanks of each text: `{blank:N}` is N tokens, `{{blank:N}}` is text.

    A blank is filled to its length: end-of-text and end-of-turn tokens are never written into one. Which length suits
    is found by trying several: examples/blank_lengths.py.

    A network with bidirectional attention sees the whole text in every call; blocks of `block_size` count from the
    first blank. One with canvases sees what comes before a canvas, and the canvas itself: a blank and what follows it,
    to the canvas's end. What does not fit goes into further canvases, which the blank does not see; behind the text a
    canvas is filled with end of text, as in training.

    Arguments and errors as in `generate`, but for these.

    Args:
        texts: a text or a list of texts. A text is plain (with the tokenizer's start of text, if it puts one), or a
            chat, as in `generate`, whose last message is the assistant's and has the blanks.
        sampler: lengths and end of text are the blanks', so `max_new_tokens` and `eos` are not taken.
        raw: control tokens that a plain text spells are tokens, and nothing is put before it.

    Returns:
        an `Infill` for each text, in their order; a list of one for a single text.

    Raises:
        SamplingError: a text without a blank, a blank without a length, a text too long for the model, a setting that
            does not apply; logits that are not finite.

    Example:
        >>> import torch, unmask
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from unmask.models.llada.config import LLaDAConfig
        >>> from unmask.models.llada.model import LLaDA, initialise
        >>> words = Tokenizer(models.WordLevel({word: id for id, word in enumerate("? the cat sat on".split())}, "?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
        >>> model = LLaDA(LLaDAConfig(
        ...     d_model=16, n_heads=2, n_layers=1, mlp_hidden_size=16, vocab_size=8, embedding_size=8,
        ...     mask_token_id=7, eos_token_id=6, pad_token_id=6,
        ... ))
        >>> initialise(model, torch.Generator().manual_seed(0))
        >>> (found,) = unmask.infill(model, "the cat {blank:2} the cat", tokenizer=tokenizer)
        >>> [len(ids) for ids in found.fill_ids], found.token_ids[:2], found.token_ids[-2:], found.stats.nfe
        ([2], [1, 2], [1, 2], 2)
    """
    loaded = as_loaded(model, tokenizer, sampler)
    check_blank_sampler(sampler)
    items = as_list(texts)
    called = labels_of(len(items), "text", labels)
    encoded = encode_blanks(items, called, tokenizer, raw, loaded.config, loaded.settings)
    return fill(loaded, encoded, called, seed, batch_size, on_event, on_answer)


def fill(
    loaded: LoadedModel,
    texts: Sequence[BlankText],
    labels: Sequence[str],
    seed: int = 42,
    batch_size: int | None = None,
    on_event: Callable[[StepEvent], None] | None = None,
    on_answer: Callable[[int, Infill], None] | None = None,
) -> list[Infill]:
    """Fill the blanks of texts that are tokens already; arguments and errors as in `infill`."""
    keys = row_keys(seed, [text.hashed for text in texts])
    keyed = enumerate(zip(texts, keys, strict=True))
    requests = [Request(index, text.prompt_ids, key, text.template) for index, (text, key) in keyed]
    requests.sort(key=lambda request: len(texts[request.index].hashed))  # texts of like length need little padding
    logs: dict[int, Tensor] = {}
    results: dict[int, Infill] = {}
    for event, row, seconds in rows_of(loaded, requests, labels, batch_size, on_event, blanks=True):
        index = event.rows[row]
        logs[index] = _log_probabilities(event, row, logs.get(index))
        if event.finished_B[row]:
            results[index] = _result(loaded, texts[index], event, row, logs.pop(index), seconds)
            if on_answer is not None:
                on_answer(index, results[index])
    return [results[index] for index in range(len(texts))]


def _log_probabilities(event: StepEvent, row: int, before: Tensor | None) -> Tensor:
    """Return log p of each position's token, (C,): of the call that committed it or wrote over it."""
    columns = slice(event.lengths[row])
    edited_C = event.revised_BC[row, columns] & ~event.masked_BC[row, columns]
    logs_C = event.confidence_BC[row, columns].clamp(min=torch.finfo(torch.float32).tiny).log()
    return logs_C if before is None else torch.where(event.committed_BC[row, columns] | edited_C, logs_C, before)


def _result(loaded: LoadedModel, text: BlankText, event: StepEvent, row: int, logs_C: Tensor, seconds: float) -> Infill:
    assert loaded.tokenizer is not None
    answer, nfe = event.answer_BC[row, : event.lengths[row]].tolist(), int(event.nfe_B[row])
    fill_ids = [answer[start:end] for start, end in text.spans]
    fills = [
        _added(loaded.tokenizer, [*text.prompt_ids, *answer[:start]], ids, loaded.turn_ids)
        for (start, _), ids in zip(text.spans, fill_ids, strict=True)
    ]
    count = sum(map(len, fill_ids))
    return Infill(
        token_ids=text.whole(answer),
        text=text.filled(fills),
        fills=fills,
        fill_ids=fill_ids,
        log_likelihood=float(torch.cat([logs_C[start:end] for start, end in text.spans]).double().mean()),
        prompt_ids=text.context,
        stats=Stats(nfe, count / nfe, seconds, count / max(seconds, 1e-9)),
    )


def _added(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int], hidden: Collection[int] = ()) -> str:
    """Return what tokens add to the text of those before them: some tokenizers drop a space that a text begins with.

    By themselves where the text before does not stay, as in the middle of a character. `hidden` tokens are in no text.
    """
    start, whole, alone = (decoded(tokenizer, part, hidden) for part in (before, [*before, *ids], ids))
    return whole[len(start) :] if whole.startswith(start) else alone
