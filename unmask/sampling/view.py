"""Answers drawn in the terminal while they are denoised.

Committed text stands as it is, bold where the last call committed it. A masked position is a shade that says how sure
the call was of its token; of a canvas its noisy tokens are drawn, dimmed. Where the output is no terminal, or NO_COLOR
is set, a few plain lines say the same.
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
from unmask.sampling.generate import Generation, answer, encode_for
from unmask.sampling.jobs import LoadedModel, as_loaded
from unmask.sampling.prompts import as_list, title_of
from unmask.sampling.text import decoded, end_of_answer, in_reasoning, printable, reasoning_tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Plain lines printed for an answer at the least, its last one not counted.
_LINES = 6
# A masked position: not scored by the call, then by rising confidence.
SHADES = "·░▒▓"
ASCII_SHADES = "_.-="


@dataclass(frozen=True)
class Drawing:
    """How the answers of one model are drawn."""

    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]  # from the first of these on nothing is drawn
    shades: str | None = SHADES  # what stands for masked positions; None draws the tokens that they hold
    hidden: frozenset[int] = frozenset()  # tokens that are not drawn, beside special ones

    @cached_property
    def _tags(self) -> tuple[int, int] | None:
        return reasoning_tags(self.tokenizer)

    def draw(
        self,
        token_ids: Sequence[int],
        masked: Sequence[bool],
        fresh: Sequence[bool],
        confidence: Sequence[float] | None = None,
        given: Collection[int] = (),
    ) -> Text:
        """Return one answer as styled text: fresh tokens bold, masked positions dim, reasoning italic.

        Fresh ones were committed by the last call, whose confidence in each token is nan where it has none. `given`
        positions were never masked; a stop token there ends nothing.
        """
        places = range(end_of_answer(token_ids, self.stops, masked, given))
        committed = [-1 if hidden else token for token, hidden in zip(token_ids, masked, strict=True)]
        thought = in_reasoning(committed, self._tags)
        text = Text()
        # Neighbours are decoded together: a character may be spread over several tokens.
        for (hidden, bold, italic), run in groupby(places, key=lambda i: (masked[i], fresh[i], thought[i])):
            run = list(run)
            if hidden and self.shades is not None:
                text.append("".join(self._shade(confidence, i) for i in run), style="dim")
            else:
                style = "dim" if hidden else "bold" if bold else "italic" if italic else ""
                text.append(printable(decoded(self.tokenizer, [token_ids[i] for i in run], self.hidden)), style=style)
        return text

    def draw_row(self, event: StepEvent, row: int, highlight: bool = True, given: Collection[int] = ()) -> Text:
        """Return one row of an event as styled text; without `highlight` nothing is bold, `given` as in `draw`."""
        # A canvas that has not begun holds nothing; masks are drawn from the start.
        end = event.lengths[row] if self.shades is not None else int(event.end_B[row])
        token_ids, masked = event.answer_BC[row, :end].tolist(), event.masked_BC[row, :end].tolist()
        fresh = event.committed_BC[row, :end].tolist() if highlight else [False] * end
        scored = event.score_BC[row, :end].isfinite()
        confidence = event.confidence_BC[row, :end].masked_fill(~scored, math.nan).tolist()
        return self.draw(token_ids, masked, fresh, confidence, given)

    def _shade(self, confidence: Sequence[float] | None, place: int) -> str:
        assert self.shades is not None
        value = math.nan if confidence is None else confidence[place]
        levels = self.shades[1:]
        return self.shades[0] if math.isnan(value) else levels[min(int(value * len(levels)), len(levels) - 1)]


def given_positions(event: StepEvent, row: int) -> frozenset[int]:
    """Return the positions of a row that were given, from the event of its first call."""
    given_C = ~(event.masked_BC[row, : event.lengths[row]] | event.committed_BC[row, : event.lengths[row]])
    return frozenset(given_C.nonzero()[:, 0].tolist())


class Watcher:
    """Draws events as they come: a callback for `generate`, and a context manager around the call.

    Rows that are denoised together are drawn below each other, under the titles of their prompts' numbers. A finished
    answer is printed and scrolls away like any other output, so nothing is lost of one longer than the window.
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
            if row not in self._given:
                self._given[row] = given_positions(event, place)
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
            committed = int((~event.masked_BC[place, :length]).sum())
            if row not in self._printed:
                for heading in self._heading(row):
                    self.console.print(heading, soft_wrap=True)
                self._printed[row] = 0
            if event.finished_B[place] or (committed - self._printed[row]) * _LINES >= length:
                self._printed[row] = committed
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


def drawing_of(loaded: LoadedModel, shades: str) -> Drawing:
    """Return how the answers of a model with a tokenizer are drawn; `shades` stand for masks, where it has them."""
    assert loaded.tokenizer is not None
    drawn = shades if loaded.settings.noise == "mask" else None
    return Drawing(loaded.tokenizer, loaded.stop_ids, drawn, loaded.turn_ids)


def watcher(loaded: LoadedModel, console: Console | None = None, titles: Mapping[int, str] | None = None) -> Watcher:
    """Return the watcher for answers of a model with a tokenizer; console None = standard output."""
    console = console if console is not None else Console()
    shades = SHADES if console.encoding.lower().startswith("utf") else ASCII_SHADES
    return Watcher(drawing_of(loaded, shades), console, titles)


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

    Arguments, result and errors as in `generate`; console None = standard output.
    """
    loaded = as_loaded(model, tokenizer, sampler)
    encoded, labels = encode_for(loaded, prompts, raw)
    titles = {index: title_of(item, index) for index, item in enumerate(as_list(prompts))} if len(encoded) > 1 else {}
    with watcher(loaded, console, titles) as draw:

        def show(event: StepEvent) -> None:
            draw(event)
            if on_event is not None:
                on_event(event)

        return answer(loaded, encoded, labels, seed, 1, show)
