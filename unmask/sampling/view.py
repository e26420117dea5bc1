"""Answers drawn in the terminal while they are denoised: settled text, what the last call settled bold, and for each
open position a shade that says how sure the call was of its candidate; or the tokens of the current canvas, dimmed.

Where the output is no terminal, or NO_COLOR is set, a few plain lines say the same.

Shapes: B rows, C answer positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import nn

from unmask.config.sampler import SamplerConfig
from unmask.sampling.engine.loop import StepEvent
from unmask.sampling.generate import Generation, generate
from unmask.sampling.jobs import LoadedModel, as_loaded
from unmask.sampling.prompts import as_list, title_of
from unmask.sampling.text import in_reasoning, printable, reasoning_tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Plain lines printed for an answer at the least, its last one not counted.
_LINES = 6
# An open position: not weighed by the call, then by rising confidence of its candidate.
SHADES = "·░▒▓"
ASCII_SHADES = "_.-="


@dataclass(frozen=True)
class Drawing:
    """How the answers of one model are drawn.

    Attributes:
        tokenizer: decodes the settled tokens.
        stops: tokens from which on nothing is drawn, since the answer ends before them.
        shades: what stands for an open position: one for those that the call did not weigh, then by rising confidence;
            None draws the token that it holds.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    shades: str | None = SHADES

    @cached_property
    def _tags(self) -> tuple[int, int] | None:
        return reasoning_tags(self.tokenizer)

    def draw(
        self,
        answer: Sequence[int],
        open_: Sequence[bool],
        fresh: Sequence[bool],
        confidence: Sequence[float] | None = None,
        given: Collection[int] = (),
    ) -> Text:
        """Return one answer as styled text: what the last call settled bold, open positions dim, reasoning italic.

        Args:
            answer: token ids.
            open_: for each, whether it is not settled yet.
            fresh: for each, whether the last call settled it.
            confidence: for each, the call's confidence in its candidate, nan for none; None = none anywhere.
            given: positions that were never open; a stop token there ends nothing.
        """
        settled_stops = (i for i, token in enumerate(answer) if token in self.stops and not open_[i] and i not in given)
        places = range(next(settled_stops, len(answer)))
        text = Text()
        settled = [-1 if is_open else token for token, is_open in zip(answer, open_, strict=True)]
        thought = in_reasoning(settled, self._tags)
        # Neighbours are decoded together: a character may be spread over several tokens.
        for (is_open, is_fresh, is_thought), run in groupby(places, key=lambda i: (open_[i], fresh[i], thought[i])):
            run = list(run)
            if is_open and self.shades is not None:
                text.append("".join(self._shade(confidence, i) for i in run), style="dim")
            else:
                style = "dim" if is_open else "bold" if is_fresh else "italic" if is_thought else ""
                decoded = self.tokenizer.decode([answer[i] for i in run], skip_special_tokens=True)
                text.append(printable(str(decoded)), style=style)
        return text

    def draw_row(self, event: StepEvent, row: int, highlight: bool = True, given: Collection[int] = ()) -> Text:
        """Return one row of an event as styled text; without `highlight` nothing is bold, `given` as in `draw`."""
        # A canvas that has not begun holds nothing; masks are drawn from the start.
        end = event.lengths[row] if self.shades is not None else int(event.begun_B[row])
        answer, is_open = event.answer_BC[row, :end].tolist(), event.masked_BC[row, :end].tolist()
        fresh = event.committed_BC[row, :end].tolist() if highlight else [False] * end
        weighed = event.score_BC[row, :end].isfinite()
        confidence = event.confidence_BC[row, :end].masked_fill(~weighed, math.nan).tolist()
        return self.draw(answer, is_open, fresh, confidence, given)

    def _shade(self, confidence: Sequence[float] | None, place: int) -> str:
        assert self.shades is not None
        value = math.nan if confidence is None else confidence[place]
        if math.isnan(value):
            return self.shades[0]
        levels = self.shades[1:]
        return levels[min(int(value * len(levels)), len(levels) - 1)]


class Watcher:
    """Draws events as they come: a callback for `generate`, and a context manager around the call.

    Rows that are denoised together are drawn below each other. A finished answer is printed and scrolls away like any
    other output, so nothing is lost of one that is longer than the window.

    Args:
        drawing: how the model's answers are drawn.
        console: where to.
        titles: what to print above an answer, by the number of its prompt.
    """

    def __init__(self, drawing: Drawing, console: Console, titles: Mapping[int, str] | None = None) -> None:
        self.drawing, self.console, self.titles = drawing, console, titles or {}
        moving = console.is_terminal and not console.no_color and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False, transient=True) if moving else None
        self._drawn: dict[int, Text] = {}
        self._printed: dict[int, int] = {}
        self._given: dict[int, frozenset[int]] = {}

    def __enter__(self) -> Watcher:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave what was drawn of unfinished answers on the screen."""
        if self._live is None:
            return
        self._live.stop()
        for row, text in self._drawn.items():
            self._print(row, text)

    def __call__(self, event: StepEvent) -> None:
        """Draw what a network call changed."""
        for place, row in enumerate(event.rows):
            if row not in self._given:  # the row's first call: what was open before it was settled by it
                was_open = event.masked_BC[place] | event.committed_BC[place]
                self._given[row] = frozenset((~was_open).nonzero()[:, 0].tolist())
        if self._live is None:
            self._print_lines(event)
            return
        finished: dict[int, Text] = {}
        for place, row in enumerate(event.rows):
            if event.finished_B[place]:
                self._drawn.pop(row, None)
                finished[row] = self.drawing.draw_row(event, place, False, self._given[row])
            else:
                self._drawn[row] = self.drawing.draw_row(event, place, True, self._given[row])
        shown = [Group(*self._heading(row), self._window(text)) for row, text in self._drawn.items()]
        self._live.update(Group(*shown), refresh=True)
        for row, text in finished.items():
            self._print(row, text)

    def _print_lines(self, event: StepEvent) -> None:
        for place, row in enumerate(event.rows):
            length = event.lengths[place]
            settled = int((~event.masked_BC[place, :length]).sum())
            if row not in self._printed:
                for heading in self._heading(row):
                    self.console.print(heading, soft_wrap=True)
                self._printed[row] = 0
            if event.finished_B[place] or (settled - self._printed[row]) * _LINES >= length:
                self._printed[row] = settled
                text = self.drawing.draw_row(event, place, False, self._given[row])
                self.console.print(Text(f"call {int(event.nfe_B[place])}: ") + text, soft_wrap=True)

    def _print(self, row: int, text: Text) -> None:
        for part in (*self._heading(row), text):
            self.console.print(part, soft_wrap=True)

    def _heading(self, row: int) -> list[Text]:
        return [Text(f"> {printable(self.titles[row])}", style="bold")] if row in self.titles else []

    def _window(self, text: Text) -> Text:
        """Return the lines around the leftmost change where there are more than the screen holds."""
        height = max(3, self.console.height // max(1, len(self._drawn)) - 2)
        lines = text.wrap(self.console, self.console.width)
        if len(lines) <= height:
            return text
        active = next((n for n, line in enumerate(lines) if any(span.style for span in line.spans)), len(lines) - 1)
        start = min(max(0, active - height // 2), len(lines) - height)
        return Text("\n").join(lines[start : start + height])


def watcher(loaded: LoadedModel, console: Console | None = None, titles: Mapping[int, str] | None = None) -> Watcher:
    """Return the watcher for a model's answers.

    Args:
        loaded: with a tokenizer.
        console: where to draw; None = standard output.
        titles: what to print above an answer, by the number of its prompt.
    """
    assert loaded.tokenizer is not None
    console = console if console is not None else Console()
    shades = SHADES if console.encoding.lower().startswith("utf") else ASCII_SHADES
    drawing = Drawing(loaded.tokenizer, loaded.stop_ids, shades if loaded.settings.noise == "mask" else None)
    return Watcher(drawing, console, titles)


def watch(
    model: nn.Module,
    prompts: Any,
    tokenizer: PreTrainedTokenizerBase,
    sampler: SamplerConfig | None = None,
    console: Console | None = None,
    *,
    seed: int = 42,
    raw: bool = False,
    on_event: Callable[[StepEvent], None] | None = None,
) -> list[Generation]:
    """Sample an answer to each prompt and draw it as it comes, one prompt after the other, the shortest first.

    Args:
        model, prompts, tokenizer, sampler, seed, raw: as in `generate`.
        console: where to draw; None = standard output.
        on_event: called after each network call, too.

    Returns:
        the answers in the prompts' order, equal to what `generate` gives.

    Raises:
        SamplingError: as in `generate`.
    """
    items = as_list(prompts)
    titles = {index: title_of(item, index) for index, item in enumerate(items)} if len(items) > 1 else {}
    with watcher(as_loaded(model, tokenizer, sampler), console, titles) as draw:

        def show(event: StepEvent) -> None:
            draw(event)
            if on_event is not None:
                on_event(event)

        options: dict[str, Any] = {"tokenizer": tokenizer, "sampler": sampler, "seed": seed, "raw": raw}
        return generate(model, items, batch_size=1, on_event=show, **options)
