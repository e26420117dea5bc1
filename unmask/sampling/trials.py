"""A text with its blanks at certain lengths: what the denoising loop is asked for, and what its events say of it.

Shapes: C answer columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmask.errors import SamplingError
from unmask.sampling.backends.backend import Backend
from unmask.sampling.blanks import Blank, lengths_to_try
from unmask.sampling.engine.loop import StepEvent
from unmask.sampling.engine.request import Template
from unmask.sampling.prompts import GivenText
from unmask.sampling.settings import MaskSettings, Settings, check_remask
from unmask.sampling.suffix import columns_behind, log_probabilities

# Stand for an open position and for a blank where a text is hashed; no token id is so large.
_OPEN, _BLANK = 2**48, 2**49


@dataclass(frozen=True)
class Trial:
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
    def length(self) -> int:
        """All its tokens, given and open, with what the last canvas is filled up with."""
        return len(self.prompt_ids) + len(self.template.answer_ids)

    def hashed(self, text: GivenText) -> list[int]:
        """Return all tokens with `_OPEN` at open positions, and behind them the blanks where a length is unknown.

        So lengths of one text draw numbers of their own, whatever other text has a trial of the same tokens.
        """
        pairs = zip(self.template.answer_ids, self.template.open, strict=True)
        tokens = [*self.prompt_ids, *(_OPEN if is_open else token for token, is_open in pairs)]
        unknown = any(blank.low < blank.high for blank in text.blanks)
        return [*tokens, *(_marked(text.blanks) if unknown else ())]


@dataclass
class Filled:
    """What the events say of a trial: tokens, their log-probabilities, and calls so far.

    `behind` has the log-probabilities of the tokens behind its blanks, once they are asked for.
    """

    logs_C: Tensor
    answer: list[int] = field(default_factory=list)
    nfe: int = 0
    behind: list[float] = field(default_factory=list)

    def take(self, event: StepEvent, place: int) -> None:
        """Take in an event in which the trial is row `place`."""
        length = event.lengths[place]
        edited_C = event.revised_BC[place, :length] & ~event.masked_BC[place, :length]
        settled_C = event.committed_BC[place, :length] | edited_C
        logs_C = event.confidence_BC[place, :length].clamp(min=torch.finfo(torch.float32).tiny).log()
        self.logs_C = torch.where(settled_C, logs_C, self.logs_C)
        self.nfe = int(event.nfe_B[place])
        if event.finished_B[place]:
            self.answer = event.answer_BC[place, :length].tolist()

    def ask_behind(self, adapter: Backend, trial: Trial, most: int) -> None:
        """Ask how likely the text behind the blanks is, with what was written into them; a call, if there is any."""
        columns = columns_behind(trial.spans, len(self.answer), most)
        if columns:
            self.behind = log_probabilities(adapter, trial.prompt_ids, self.answer, columns)
            self.nfe += 1


def whole_text(text: GivenText) -> list[int]:
    """Return a text as numbers, equal where texts ask for the same: its tokens, and of each blank the lengths."""
    first, *rest = text.ids
    pairs = zip(text.blanks, rest, strict=True)
    behind = [number for blank, ids in pairs for number in (*_marked([blank]), *ids)]
    return [*text.prompt_ids, *first, *behind, *text.closing]


def _marked(blanks: Sequence[Blank]) -> list[int]:
    return [number for blank in blanks for number in (_BLANK, blank.low, blank.high)]


def trials_of(
    texts: Sequence[GivenText], places: Sequence[str], settings: Settings, max_length: int, rows: int, eos_id: int
) -> list[Trial]:
    """Return each text at each combination of lengths that is tried, text by text.

    Args:
        texts: their pieces, with tokens before, between and behind the blanks.
        places: what messages call each.
        settings: of the model's family; blocks are `block_size` positions, counted from the first blank.
        max_length: longest text, in tokens.
        rows: ids that the model accepts are below this.
        eos_id: end of text, with which the last canvas is filled up.

    Raises:
        SamplingError: a text does not fit the model, or begins with a blank where a canvas needs something before it.
    """
    trials: list[Trial] = []
    for index, (text, place) in enumerate(zip(texts, places, strict=True)):
        for lengths in lengths_to_try(text.blanks):
            # Asked before anything of that size is made.
            given = len(text.prompt_ids) + sum(map(len, text.ids[:-1]))
            _check_length(given + sum(lengths), place, settings, max_length)
            trials.append(_lay_out(index, text, lengths, settings, eos_id))
            _check(trials[-1], place, settings, max_length, rows)
    return trials


def _lay_out(index: int, text: GivenText, lengths: Sequence[int], settings: Settings, eos_id: int) -> Trial:
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
    if not isinstance(settings, MaskSettings):
        last = spans[-1][1] - 1
        whole = (last // size + 1) * size  # nothing sees a canvas behind the last blank's
        ids = [*ids, *[eos_id] * (whole - len(ids))][:whole]
        is_open = [*is_open, *[False] * (whole - len(is_open))][:whole]
    return Trial(
        index,
        [*text.prompt_ids, *before],
        Template(ids, is_open, [place // size for place in range(len(ids))]),
        spans,
        columns,
    )


def _check(trial: Trial, place: str, settings: Settings, max_length: int, rows: int) -> None:
    _check_length(trial.length, place, settings, max_length)
    if not trial.prompt_ids and not isinstance(settings, MaskSettings):
        raise SamplingError(f"{place}: a canvas needs something before it; begin the text with a word, or give a chat")
    outside = [token for token in (*trial.prompt_ids, *trial.template.answer_ids) if not 0 <= token < rows]
    if outside:
        raise SamplingError(
            f"{place}: token id {outside[0]} is outside the model's vocabulary of {rows}; use the tokenizer that "
            "belongs to the checkpoint"
        )


def _check_length(total: int, place: str, settings: Settings, max_length: int) -> None:
    if total > max_length:
        whole = "" if isinstance(settings, MaskSettings) else ", in whole canvases from the first blank,"
        raise SamplingError(
            f"{place}: {total} tokens{whole} are over the model's max_sequence_length {max_length}; "
            "shorten the text or its blanks"
        )


def check_revise(trials: Sequence[Trial], settings: MaskSettings) -> None:
    """Refuse to revise where it can do nothing in any of the trials."""
    for trial in trials:
        pairs = zip(trial.template.block_of, trial.template.open, strict=True)
        blocks = Counter(block for block, is_open in pairs if is_open)
        try:
            check_remask(settings, list(blocks.values()))
            return
        except SamplingError:
            if trial is trials[-1]:
                raise


def title(text: GivenText, trial: Trial) -> str:
    lengths = iter(end - start for start, end in trial.spans)
    return "".join(f"{{blank:{next(lengths)}}}" if isinstance(piece, Blank) else piece for piece in text.pieces)
