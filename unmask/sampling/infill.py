"""Filling blanks in a text: what is given stays, token for token, and is seen on both sides of a blank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError
from unmask.sampling.blanks import Blank
from unmask.sampling.engine.draws import repeats, row_key
from unmask.sampling.engine.loop import StepEvent, denoise
from unmask.sampling.engine.request import Request
from unmask.sampling.generate import RowClock, Stats, checked_batch_size, evaluating
from unmask.sampling.jobs import as_loaded
from unmask.sampling.prompts import GivenText, as_list, encode_given, labels_of
from unmask.sampling.settings import MaskSettings
from unmask.sampling.trials import Filled, Trial, check_revise, title, trials_of, whole_text

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
            call that settled it (or wrote over it: `revise` edit; of a canvas: its last), at temperature 1.
        prompt_ids: what stands before the text.
        stats: what it cost; `nfe` counts the calls for all lengths tried, tokens are the filled ones, and `seconds` run
            from the first of these calls to the last.
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
    on_trials: Callable[[list[str]], None] | None = None,
    labels: Sequence[str] | None = None,
) -> list[Infill]:
    """Fill the blanks of each text: `{blank:N}` is N tokens, `{blank:A-B}` A to B; `{{blank:N}}` is text.

    A blank is filled to its length: end-of-text and end-of-turn tokens are never written into one. Of a blank of
    unknown length each length is sampled, or eight spread over the range (of two such blanks four of each, of three
    two), and the most likely is kept. LLaDA's are compared by

        (Σ log p(fill token) + Σ log p(token behind a blank)) / (number of both),

    where fill tokens count as in `Infill.log_likelihood`, and tokens behind a blank, up to `block_size` of each, by one
    full forward that sees the fills and has all of these masked. Of DiffusionGemma's, `Infill.log_likelihood` is
    compared. Both are heuristics, no likelihood of the whole text.

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
        seed: with equal seed and text the fills are the same; a text given twice draws other numbers the second time.
        raw: control tokens that a plain text spells are tokens, and nothing is put before it.
        batch_size: rows denoised together, at least 1; None = 16.
        on_event: called after each network call; `rows` number the lengths tried, text by text.
        on_answer: called with a text's number and its `Infill` as soon as all lengths are tried.
        on_trials: called once, before the first event, with a title for each number that `rows` may have: the text (of
            a chat, its last message) with the length tried in each blank.
        labels: what messages call each text; None = `text NUMBER`, from 0.

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
    check_sampler(sampler)
    size = checked_batch_size(batch_size)
    loaded = as_loaded(model, tokenizer, sampler)
    settings, adapter = loaded.settings, loaded.backend
    items = as_list(texts)
    called = labels_of(len(items), "text", labels)
    given = [
        encode_given(place, text, tokenizer, raw, adapter.spec.mask_id)
        for place, text in zip(called, items, strict=True)
    ]
    eos_id = int(model.config.eos_token_id)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    trials = trials_of(given, called, settings, adapter.spec.max_length, adapter.spec.rows, eos_id)
    if isinstance(settings, MaskSettings):
        check_revise(trials, settings)
    if on_trials is not None:
        on_trials([title(given[trial.index], trial) for trial in trials])
    requests = _requests(given, trials, seed)
    names = [called[trial.index] for trial in trials]
    found: dict[int, Filled] = {}
    tried: dict[int, list[int]] = {}
    for number, trial in enumerate(trials):
        tried.setdefault(trial.index, []).append(number)
    waiting = {index: len(numbers) for index, numbers in tried.items()}
    results: dict[int, Infill] = {}
    stops, clock = loaded.stop_ids, RowClock()
    with evaluating(model):
        for event in denoise(adapter, requests, settings, stops, None, size, stops, untempered=True, places=names):
            clock.tick(event.rows)
            if on_event is not None:
                on_event(event)
            for place, number in enumerate(event.rows):
                trial = trials[number]
                index = trial.index
                if number not in found:
                    found[number] = Filled(torch.zeros(len(trial.template.open)))
                found[number].take(event, place)
                if not event.finished_B[place]:
                    continue
                if len(tried[index]) > 1 and adapter.spec.noise == "mask":
                    found[number].ask_behind(adapter, trial, settings.block_size)
                waiting[index] -= 1
                if not waiting[index]:
                    pairs = [(trials[n], found.pop(n)) for n in tried[index]]
                    seconds = max(map(clock.seconds, tried[index]))
                    results[index] = _best(given[index], pairs, seconds, tokenizer)
                    if on_answer is not None:
                        on_answer(index, results[index])
    return [results[index] for index in range(len(given))]


def check_sampler(sampler: SamplerConfig | None) -> None:
    """Refuse settings that do not apply to blanks; raises SamplingError."""
    for name in ("max_new_tokens", "eos"):
        if sampler is not None and getattr(sampler, name) is not None:
            raise SamplingError(f"{name}: blanks are filled to the lengths that they name; leave it out")


def _requests(given: list[GivenText], trials: list[Trial], seed: int) -> list[Request]:
    """Return what to ask for, in an order in which a text is answered early and its neighbours are of like length."""
    counts = repeats(whole_text(text) for text in given)
    requests = []
    for number, trial in enumerate(trials):
        key = row_key(seed, trial.hashed(given[trial.index]), counts[trial.index])
        requests.append(Request(number, trial.prompt_ids, key, trial.template))
    longest = [0] * len(given)
    for trial in trials:
        longest[trial.index] = max(longest[trial.index], trial.length)

    def order(request: Request) -> tuple[int, int, int]:
        trial = trials[request.index]
        return longest[trial.index], trial.index, trial.length

    return sorted(requests, key=order)


def _best(
    text: GivenText, tried: list[tuple[Trial, Filled]], seconds: float, tokenizer: PreTrainedTokenizerBase
) -> Infill:
    """Return the most likely of the trials of one text; of equal ones the first."""
    trial, filled = max(tried, key=lambda pair: _rank(*pair))
    fill_ids = [filled.answer[start:end] for start, end in trial.spans]
    fills = [
        _added(tokenizer, [*trial.prompt_ids, *filled.answer[:start]], ids)
        for (start, _), ids in zip(trial.spans, fill_ids, strict=True)
    ]
    # Columns of the text that lie behind the last canvas are as they were given.
    answer = list(filled.answer)
    tail = [token for piece in text.ids[1:] for token in piece]
    if trial.columns > len(answer):
        answer += tail[len(tail) - (trial.columns - len(answer)) :]
    written = iter(fills)
    count, nfe = sum(map(len, fill_ids)), sum(other.nfe for _, other in tried)
    return Infill(
        token_ids=text.ids[0] + answer[: trial.columns],
        text="".join(next(written) if isinstance(piece, Blank) else piece for piece in text.pieces),
        fills=fills,
        fill_ids=fill_ids,
        log_likelihood=_log_likelihood(trial, filled),
        prompt_ids=text.prompt_ids,
        stats=Stats(nfe, count / nfe, seconds, count / max(seconds, 1e-9)),
    )


def _added(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """Return what tokens add to the text of those before them: some tokenizers drop a space that a text begins with.

    By themselves where the text before does not stay, as in the middle of a character.
    """
    start, whole = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (before, [*before, *ids]))
    return whole[len(start) :] if whole.startswith(start) else str(tokenizer.decode(ids, skip_special_tokens=True))


def _log_likelihood(trial: Trial, filled: Filled) -> float:
    logs = torch.cat([filled.logs_C[start:end] for start, end in trial.spans])
    return float(logs.double().mean())


def _rank(trial: Trial, filled: Filled) -> float:
    count = sum(end - start for start, end in trial.spans)
    return (_log_likelihood(trial, filled) * count + sum(filled.behind)) / (count + len(filled.behind))
