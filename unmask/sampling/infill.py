"""Filling blanks in a text: what is given stays, token for token, and is seen on both sides of a blank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unmask.errors import SamplingError
from unmask.sampling.adapters import FamilySpec, adapter_for, settings_for
from unmask.sampling.blanks import Blank, lengths_to_try
from unmask.sampling.denoise import StepEvent, denoise
from unmask.sampling.draws import row_keys
from unmask.sampling.generate import RowClock, Stats, checked_batch_size, evaluating, stop_ids
from unmask.sampling.prompts import GivenText, as_list, encode_given
from unmask.sampling.request import Request, Template
from unmask.sampling.settings import SamplerConfig, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for an open position where a text is hashed; no token id is so large.
_OPEN = 2**48


@dataclass(frozen=True)
class Infill:
    """A text with its blanks filled.

    Attributes:
        token_ids: the whole text, without what was put before or behind it (a chat's turns, a start of text).
        text: the given text as it was given, the fills decoded without special tokens.
        fills: the text of each blank.
        fill_ids: the tokens of each blank.
        log_likelihood: mean over the filled tokens of the log-probability, in nats, that the model gave each in the
            call that settled it (of a canvas: its last, at that call's temperature). Of the lengths tried for a blank
            of unknown length, those with the highest are kept.
        prompt_ids: what stands before the text.
        stats: what it cost; `nfe` counts the calls for all lengths tried, tokens are the filled ones.
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
) -> list[Infill]:
    """Fill the blanks of each text: `{blank:N}` is N tokens, `{blank:A-B}` A to B; `{{blank:N}}` is text.

    A blank is filled to its length: end-of-text and end-of-turn tokens are never written into one. Of a blank of
    unknown length each length is sampled, or eight spread over the range (of two such blanks four of each, of three
    two), and the best is kept by `Infill.log_likelihood`.

    LLaDA sees the whole text in every call; blocks of `block_size` count from the first blank. DiffusionGemma sees what
    comes before a canvas, and the canvas itself: a blank and what follows it, to the canvas's end. What does not fit
    goes into further canvases, which the blank does not see; behind the text a canvas is filled with end-of-text, as in
    training.

    Args:
        model: from `unmask.load_model`; put into eval mode for the time of the call.
        texts: a text or a list of texts. A text is plain (with the tokenizer's start of text, if it puts one), or a
            chat, a list of {"role", "content"} whose last message is the assistant's and has the blanks.
        tokenizer: the model's.
        sampler: settings; lengths and end of text are the blanks', so `max_new_tokens` and `eos` are not taken.
        seed: with equal seed and text the fills are the same.
        raw: control tokens that a plain text spells are tokens, and nothing is put before it.
        batch_size: rows denoised together, at least 1; None = 16.
        on_event: called after each network call; `rows` number the lengths tried, text by text.
        on_answer: called with a text's place and its `Infill` as soon as all lengths are tried.

    Returns:
        an `Infill` for each text, in their order; a list of one for a single text.

    Raises:
        SamplingError: a text without a blank, a blank without a length, a text too long for the model, a setting that
            does not apply; logits that are not finite.
    """
    for name in ("max_new_tokens", "eos"):
        if sampler is not None and getattr(sampler, name) is not None:
            raise SamplingError(f"{name}: blanks are filled to the lengths that they name; leave it out")
    size = checked_batch_size(batch_size)
    settings = settings_for(model, sampler)
    adapter = adapter_for(model, settings)
    given = [
        encode_given(index, text, tokenizer, raw, adapter.spec.mask_id) for index, text in enumerate(as_list(texts))
    ]
    eos_id = int(model.config.eos_token_id)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    trials = [
        _lay_out(index, text, lengths, settings, adapter.spec, eos_id)
        for index, text in enumerate(given)
        for lengths in lengths_to_try([piece for piece in text.pieces if isinstance(piece, Blank)])
    ]
    keys = row_keys(seed, [[*trial.prompt_ids, *trial.hashed] for trial in trials])
    requests = [
        Request(number, trial.prompt_ids, key, trial.template)
        for number, (trial, key) in enumerate(zip(trials, keys, strict=True))
    ]
    requests.sort(key=lambda request: len(request.prompt_ids) + len(trials[request.index].template.answer_ids))
    found: dict[int, _Filled] = {}
    waiting = Counter(trial.index for trial in trials)
    results: dict[int, Infill] = {}
    stops, clock = stop_ids(adapter, tokenizer), RowClock()
    with evaluating(model):
        for event in denoise(adapter, requests, settings, stops, batch_size=size, banned_ids=stops):
            clock.tick(event.rows)
            if on_event is not None:
                on_event(event)
            for place, number in enumerate(event.rows):
                filled = found.setdefault(number, _Filled(torch.zeros(len(trials[number].hashed))))
                filled.take(event, place, clock.seconds(number))
                index = trials[number].index
                waiting[index] -= bool(event.finished_B[place])
                if not waiting[index]:
                    tried = [(trial, found[n]) for n, trial in enumerate(trials) if trial.index == index]
                    results[index] = _best(given[index], tried, tokenizer)
                    if on_answer is not None:
                        on_answer(index, results[index])
    return [results[index] for index in range(len(given))]


@dataclass(frozen=True)
class _Trial:
    """A text with its blanks at certain lengths.

    Attributes:
        index: the text's place.
        prompt_ids: all before the first blank.
        template: from there on; its last canvas filled up.
        spans: of each blank, its columns in the template.
        columns: columns of the template that are the text's.
    """

    index: int
    prompt_ids: list[int]
    template: Template
    spans: list[tuple[int, int]]
    columns: int

    @property
    def hashed(self) -> list[int]:
        """The template's tokens with `_OPEN` at open positions."""
        pairs = zip(self.template.answer_ids, self.template.open, strict=True)
        return [_OPEN if is_open else token for token, is_open in pairs]


@dataclass
class _Filled:
    """What the events say of a trial: tokens, their log-probabilities, calls and time so far."""

    logs_C: Tensor
    answer: list[int] = field(default_factory=list)
    nfe: int = 0
    seconds: float = 0.0

    def take(self, event: StepEvent, place: int, seconds: float) -> None:
        """Take in an event in which the trial is row `place`."""
        length = event.lengths[place]
        settled_C = event.committed_BC[place, :length]
        logs_C = event.confidence_BC[place, :length].clamp(min=torch.finfo(torch.float32).tiny).log()
        self.logs_C = torch.where(settled_C, logs_C, self.logs_C)
        self.nfe, self.seconds = int(event.nfe_B[place]), seconds
        if event.finished_B[place]:
            self.answer = event.answer_BC[place, :length].tolist()


def _lay_out(
    index: int, text: GivenText, lengths: Sequence[int], settings: Settings, spec: FamilySpec, eos_id: int
) -> _Trial:
    before, *rest = text.ids
    ids: list[int] = []
    is_open: list[bool] = []
    spans: list[tuple[int, int]] = []
    for length, piece in zip(lengths, rest, strict=True):
        spans.append((len(ids), len(ids) + length))
        ids += [0] * length + piece
        is_open += [True] * length + [False] * len(piece)
    columns = len(ids)
    ids, is_open = ids + text.closing, is_open + [False] * len(text.closing)
    size = settings.block_size
    if spec.block_size is not None:
        last = spans[-1][1] - 1
        whole = (last // size + 1) * size  # nothing sees a canvas behind the last blank's
        ids = [*ids, *[eos_id] * (whole - len(ids))][:whole]
        is_open = [*is_open, *[False] * (whole - len(is_open))][:whole]
    trial = _Trial(
        index,
        [*text.prompt_ids, *before],
        Template(ids, is_open, [place // size for place in range(len(ids))]),
        spans,
        columns,
    )
    _check(trial, spec)
    return trial


def _check(trial: _Trial, spec: FamilySpec) -> None:
    total = len(trial.prompt_ids) + len(trial.template.answer_ids)
    if total > spec.max_length:
        whole = "" if spec.block_size is None else ", in whole canvases from the first blank,"
        raise SamplingError(
            f"text {trial.index}: {total} tokens{whole} are over the model's max_sequence_length {spec.max_length}; "
            "shorten the text or its blanks"
        )
    if not trial.prompt_ids and spec.attention == "block_causal":
        raise SamplingError(
            f"text {trial.index}: a canvas needs something before it; begin the text with a word, or give a chat"
        )
    outside = [token for token in (*trial.prompt_ids, *trial.template.answer_ids) if not 0 <= token < spec.rows]
    if outside:
        raise SamplingError(
            f"text {trial.index}: token id {outside[0]} is outside the model's vocabulary of {spec.rows}; use the "
            "tokenizer that belongs to the checkpoint"
        )


def _best(text: GivenText, tried: list[tuple[_Trial, _Filled]], tokenizer: PreTrainedTokenizerBase) -> Infill:
    """Return the most likely of the trials of one text; of equal ones the first."""
    trial, filled = max(tried, key=lambda pair: _log_likelihood(*pair))
    fill_ids = [filled.answer[start:end] for start, end in trial.spans]
    fills = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in fill_ids]
    # Columns of the text that lie behind the last canvas are as they were given.
    answer = list(filled.answer)
    tail = [token for piece in text.ids[1:] for token in piece]
    if trial.columns > len(answer):
        answer += tail[len(tail) - (trial.columns - len(answer)) :]
    written = iter(fills)
    count, nfe = sum(map(len, fill_ids)), sum(other.nfe for _, other in tried)
    seconds = sum(other.seconds for _, other in tried)
    return Infill(
        token_ids=text.ids[0] + answer[: trial.columns],
        text="".join(next(written) if isinstance(piece, Blank) else piece for piece in text.pieces),
        fills=fills,
        fill_ids=fill_ids,
        log_likelihood=_log_likelihood(trial, filled),
        prompt_ids=text.prompt_ids,
        stats=Stats(nfe, count / nfe, seconds, count / max(seconds, 1e-9)),
    )


def _log_likelihood(trial: _Trial, filled: _Filled) -> float:
    logs = torch.cat([filled.logs_C[start:end] for start, end in trial.spans])
    return float(logs.double().mean())
