"""An answer drawn in the terminal while it is denoised: settled text, and a block of shade for each masked position, or
the tokens of the current canvas, dimmed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import nn

from unmask.sampling.adapters import adapter_for, settings_for
from unmask.sampling.denoise import StepEvent
from unmask.sampling.generate import Generation, generate, stop_ids
from unmask.sampling.settings import SamplerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where output is not a terminal: lines printed for an answer at the least, its last one not counted.
_LINES = 6


@dataclass(frozen=True)
class Drawing:
    """How the answers of one model are drawn.

    Attributes:
        tokenizer: decodes the settled tokens.
        stops: tokens from which on nothing is drawn, since the answer ends before them.
        blank: what stands for an open position; None draws the token that it holds.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    blank: str | None = "░"

    def draw(self, answer: Sequence[int], open_: Sequence[bool], fresh: Sequence[bool]) -> Text:
        """Return one answer as styled text: what the last call settled bold, open positions dim.

        Args:
            answer: token ids.
            open_: for each, whether it is not settled yet.
            fresh: for each, whether the last call settled it.
        """
        settled_stops = (i for i, token in enumerate(answer) if token in self.stops and not open_[i])
        places = range(next(settled_stops, len(answer)))
        text = Text()
        # Neighbours are decoded together: a character may be spread over several tokens.
        for (is_open, is_fresh), run in groupby(places, key=lambda i: (open_[i], fresh[i])):
            ids = [answer[i] for i in run]
            if is_open and self.blank is not None:
                text.append(self.blank * len(ids), style="dim")
            else:
                style = "dim" if is_open else "bold" if is_fresh else ""
                text.append(str(self.tokenizer.decode(ids, skip_special_tokens=True)), style=style)
        return text


def watch(
    model: nn.Module,
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    sampler: SamplerConfig | None = None,
    console: Console | None = None,
    *,
    seed: int = 42,
    raw: bool = False,
) -> Generation:
    """Sample an answer to one prompt and draw it as it comes; plain lines where the output is not a terminal.

    Args:
        model, prompt, tokenizer, sampler, seed, raw: as in `generate`.
        console: where to draw; None = standard output.

    Returns:
        the answer, equal to what `generate` gives.

    Raises:
        SamplingError: as in `generate`.
    """
    console = console if console is not None else Console()
    adapter = adapter_for(model, settings_for(model, sampler))
    shade = "░" if console.encoding.lower().startswith("utf") else "_"
    blank = shade if adapter.spec.noise == "mask" else None
    drawing = Drawing(tokenizer, stop_ids(adapter, tokenizer), blank)
    options: dict[str, Any] = {"tokenizer": tokenizer, "sampler": sampler, "seed": seed, "raw": raw}
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:

            def show(event: StepEvent) -> None:
                # After the last call everything is settled, so the highlight goes.
                live.update(_draw(drawing, event, highlight=not bool(event.finished_B[0])), refresh=True)

            return generate(model, [prompt], on_event=show, **options)[0]

    printed = 0

    def show_line(event: StepEvent) -> None:
        nonlocal printed
        settled = int((~event.open_BC[0]).sum())
        if event.finished_B[0] or (settled - printed) * _LINES >= event.open_BC.shape[1]:
            printed = settled
            line = Text(f"call {int(event.nfe_B[0])}: ") + _draw(drawing, event, highlight=False)
            console.print(line, soft_wrap=True)

    return generate(model, [prompt], on_event=show_line, **options)[0]


def _draw(drawing: Drawing, event: StepEvent, highlight: bool) -> Text:
    answer, is_open = event.answer_BC[0].tolist(), event.open_BC[0].tolist()
    fresh = event.committed_BC[0].tolist() if highlight else [False] * len(answer)
    begun = len(answer) if drawing.blank is not None else int(event.begun_B[0])
    return drawing.draw(answer[:begun], is_open[:begun], fresh[:begun])
