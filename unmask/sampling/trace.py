"""A run of the sampler as a web page that replays it: what each network call settled, and how sure it was.

The page is one file without anything from the network. It holds what changed from call to call, as JSON, and the script
that draws it (trace.html).

Shapes: B rows, C answer positions.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unmask.errors import SamplingError
from unmask.sampling.prompts import title_of
from unmask.sampling.text import token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unmask.sampling.engine.loop import StepEvent
    from unmask.sampling.jobs import LoadedModel

_PLACE = re.compile(r"\{\{(\w+)\}\}")
# Scores and confidences are kept in thousandths: the page shows three digits.
_SCALE = 1000


@dataclass
class _Row:
    """One answer as it is recorded: the last call's ids and open positions, and what each call changed."""

    ids: list[int]
    open: list[bool]
    given: list[int]
    start: list[list[int]]
    calls: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


class Trace:
    """Records events, as a callback for `generate`, and writes them as a page.

    Args:
        tokenizer: says what tokens stand for.
        stops: tokens that end an answer (`generate.stop_ids`).
        noise: what stands at open positions: masks, or random tokens (the family's `noise`).
        checkpoint: what the page calls the model.
        sampler: the settings in force, by name.
        label: whether every call is a full forward: "exact", or what is approximate (`approximations`).
        seed: the run's seed.
        prompts: what to show as each prompt, in the order of their numbers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stops: Sequence[int],
        noise: Literal["mask", "uniform"],
        checkpoint: str,
        sampler: Mapping[str, Any],
        label: str,
        seed: int,
        prompts: Sequence[str],
    ) -> None:
        self.tokenizer, self.stops, self.prompts = tokenizer, frozenset(stops), list(prompts)
        self.facts = {
            "checkpoint": checkpoint,
            "label": label,
            "seed": seed,
            "noise": noise,
            "sampler": {name: value for name, value in sampler.items() if value is not None},
        }
        self._rows: dict[int, _Row] = {}

    def __call__(self, event: StepEvent) -> None:
        """Record what a network call changed."""
        for place, (index, length) in enumerate(zip(event.rows, event.lengths, strict=True)):
            ids, is_open = event.answer_BC[place, :length].tolist(), event.masked_BC[place, :length].tolist()
            settled = event.committed_BC[place, :length].tolist()
            score, sure = event.score_BC[place, :length].tolist(), event.confidence_BC[place, :length].tolist()
            weighed = [i for i, value in enumerate(score) if math.isfinite(value)]
            row = self._rows.get(index)
            if row is None:
                was_open = [now or just for now, just in zip(is_open, settled, strict=True)]
                given = [position for position, free in enumerate(was_open) if not free]
                # Before the first call open positions hold the mask, or noise of which nothing is known.
                start = _runs((position, ids[position]) for position in given)
                row = self._rows[index] = _Row([-1] * len(ids), was_open, given, start)
                for position in given:
                    row.ids[position] = ids[position]
            edited = event.revised_BC[place, :length] & ~event.masked_BC[place, :length]
            told = sorted({*weighed, *edited.nonzero()[:, 0].tolist()})
            call = {
                "nfe": int(event.nfe_B[place]),
                "block": int(event.block_B[place]),
                "begun": int(event.begun_B[place]),
                "ids": _runs((i, token) for i, token in enumerate(ids) if token != row.ids[i]),
                "settled": _runs((i, 1) for i, just in enumerate(settled) if just),
                "reopened": _runs((i, 1) for i, now in enumerate(is_open) if now and not row.open[i]),
                "sure": _runs((i, round(sure[i] * _SCALE)) for i in told),
                # Most scores are that probability itself.
                "scores": _runs((i, round(score[i] * _SCALE)) for i in weighed if abs(score[i] - sure[i]) > 1e-6),
            }
            row.calls.append({name: value for name, value in call.items() if value != []})
            row.ids, row.open, row.finished = ids, is_open, bool(event.finished_B[place])

    def write(self, path: Path) -> None:
        """Write the page, replacing one that is there.

        Raises:
            SamplingError: the file cannot be written.
        """
        temporary = path.with_name(path.name + ".part")
        try:
            temporary.write_text(self.page(), "utf-8")
            temporary.replace(path)
        except OSError as error:
            raise SamplingError(f"--trace: {path}: {error.strerror or error}; name a file that you may write") from None

    def page(self) -> str:
        """Return the page."""
        rows = [self._row(index) for index in sorted(self._rows)]
        data = self.facts | {"stops": sorted(self.stops), "tokens": self._tokens(), "rows": rows}
        answers = "".join(f"<p>{html.escape(row['prompt'])}</p><pre>{html.escape(row['text'])}</pre>" for row in rows)
        parts = {"title": html.escape(str(self.facts["checkpoint"])), "data": _script_json(data), "answers": answers}
        template = files("unmask.sampling").joinpath("trace.html").read_text("utf-8")
        return _PLACE.sub(lambda place: parts[place[1]], template)

    def _row(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        given = set(row.given)
        stop = (i for i, token in enumerate(row.ids) if token in self.stops and not row.open[i] and i not in given)
        answer = row.ids[: next(stop, len(row.ids))]
        return {
            "prompt": self.prompts[index] if index < len(self.prompts) else f"prompt {index + 1}",
            "length": len(row.ids),
            "answer": len(answer),
            "finished": row.finished,
            "text": str(self.tokenizer.decode(answer, skip_special_tokens=True)),
            "given": row.start,
            "calls": row.calls,
        }

    def _tokens(self) -> dict[str, str | list[int]]:
        """Return what every token that occurs stands for."""
        shown = {token for row in self._rows.values() for run in row.start for token in run[1:]}
        shown |= {
            t for row in self._rows.values() for call in row.calls for run in call.get("ids", ()) for t in run[1:]
        }
        return {str(token): token_text(self.tokenizer, token) for token in sorted(shown)}


def trace_for(loaded: LoadedModel, prompts: Iterable[Any], *, checkpoint: str, seed: int) -> Trace:
    """Return the trace for answers of a model.

    Args:
        loaded: with a tokenizer.
        prompts: as in `generate`.
        checkpoint, seed: as in `Trace`.
    """
    assert loaded.tokenizer is not None
    settings = loaded.settings
    return Trace(
        loaded.tokenizer,
        stops=loaded.stop_ids,
        noise=loaded.settings.noise,
        checkpoint=checkpoint,
        sampler={"family": settings.family} | settings.values,
        label="exact" if settings.exact else "approximate: " + "; ".join(settings.approximations),
        seed=seed,
        prompts=[title_of(prompt, index) for index, prompt in enumerate(prompts)],
    )


def _runs(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return (position, value) pairs in order as lists of a first position and the values from there on."""
    runs: list[list[int]] = []
    end = -1
    for position, value in pairs:
        if position != end:
            runs.append([position])
        runs[-1].append(value)
        end = position + 1
    return runs


def _script_json(value: Any) -> str:
    """Return JSON that may stand in a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
