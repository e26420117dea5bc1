"""A run of the sampler as a web page that replays it: what each network call committed, and how sure it was.

The page is one file without anything from the network. It holds what changed from call to call, as JSON, and the script
that draws it (trace.html).

Shapes: B rows, C answer positions.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.errors import SamplingError
from unmask.places import part_of
from unmask.sampling.prompts import title_of
from unmask.sampling.text import decoded, end_of_answer, token_text
from unmask.sampling.view import given_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unmask.sampling.engine.loop import StepEvent
    from unmask.sampling.jobs import LoadedModel

_PLACE = re.compile(r"\{\{(\w+)\}\}")
# Scores and confidences are kept in thousandths: the page shows three digits.
_SCALE = 1000


@dataclass
class _Row:
    """One answer as it is recorded: its ids and masked positions after the last call, and what each call changed."""

    ids: list[int]
    masked: list[bool]
    given: frozenset[int]
    start: list[list[int]]
    calls: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


class Trace:
    """Records events, as a callback for `generate`, and writes them as a page.

    `facts` are what the page says of the run: `checkpoint`, its name; `sampler`, the settings by name; `label`, "exact"
    or what is approximate; `seed`; `noise`, the family's. `prompts` are shown in the order of their numbers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
        prompts: Sequence[str],
        facts: Mapping[str, Any],
        hidden: Collection[int] = (),
    ) -> None:
        self.tokenizer, self.stops, self.hidden = tokenizer, frozenset(stops), frozenset(hidden)
        self.prompts, self.facts = list(prompts), dict(facts)
        self._rows: dict[int, _Row] = {}

    def __call__(self, event: StepEvent) -> None:
        """Record what a network call changed."""
        for place, (index, length) in enumerate(zip(event.rows, event.lengths, strict=True)):
            ids, masked = event.answer_BC[place, :length].tolist(), event.masked_BC[place, :length].tolist()
            if index not in self._rows:
                given = given_positions(event, place)
                # Before the first call masked positions hold the mask, or noise of which nothing is known.
                before = [ids[i] if i in given else -1 for i in range(length)]
                start = _runs((i, ids[i]) for i in sorted(given))
                self._rows[index] = _Row(before, [i not in given for i in range(length)], given, start)
            row = self._rows[index]
            score, confidence = event.score_BC[place, :length].tolist(), event.confidence_BC[place, :length].tolist()
            scored = [i for i, value in enumerate(score) if math.isfinite(value)]
            edited = event.revised_BC[place, :length] & ~event.masked_BC[place, :length]
            sure = sorted({*scored, *edited.nonzero()[:, 0].tolist()})
            committed = event.committed_BC[place, :length].nonzero()[:, 0].tolist()
            call = {
                "nfe": int(event.nfe_B[place]),
                "block": int(event.block_B[place]),
                "begun": int(event.end_B[place]),
                "ids": _runs((i, token) for i, token in enumerate(ids) if token != row.ids[i]),
                "committed": _runs((i, 1) for i in committed),
                "remasked": _runs((i, 1) for i, now in enumerate(masked) if now and not row.masked[i]),
                "sure": _runs((i, round(confidence[i] * _SCALE)) for i in sure),
                # Most scores are that probability itself.
                "scores": _runs((i, round(score[i] * _SCALE)) for i in scored if abs(score[i] - confidence[i]) > 1e-6),
            }
            row.calls.append({name: value for name, value in call.items() if value != []})
            row.ids, row.masked, row.finished = ids, masked, bool(event.finished_B[place])

    def write(self, path: Path) -> bool:
        """Write the page, replacing one that is there; return whether there was an event to write of.

        Raises:
            SamplingError: the file cannot be written.
        """
        if not self._rows:
            return False
        try:
            with part_of(path) as part:
                part.write_text(self.page(), "utf-8")
        except OSError as error:
            raise SamplingError(f"--trace: {path}: {error.strerror or error}; name a file that you may write") from None
        return True

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
        answer = row.ids[: end_of_answer(row.ids, self.stops, row.masked, row.given)]
        return {
            "prompt": self.prompts[index] if index < len(self.prompts) else f"prompt {index + 1}",
            "length": len(row.ids),
            "answer": len(answer),
            "finished": row.finished,
            "text": decoded(self.tokenizer, answer, self.hidden),
            "given": row.start,
            "calls": row.calls,
        }

    def _tokens(self) -> dict[str, str | list[int]]:
        """Return what every token that occurs stands for."""
        shown: set[int] = set()
        for row in self._rows.values():
            for runs in (row.start, *(call.get("ids", ()) for call in row.calls)):
                shown.update(token for run in runs for token in run[1:])
        return {str(token): token_text(self.tokenizer, token) for token in sorted(shown)}


def trace_for(loaded: LoadedModel, prompts: Iterable[Any], *, checkpoint: str, seed: int) -> Trace:
    """Return the trace for answers of a model with a tokenizer; prompts as in `generate`, the rest as in `Trace`."""
    assert loaded.tokenizer is not None
    settings = loaded.settings
    facts = {
        "checkpoint": checkpoint,
        "label": "exact" if settings.exact else "approximate: " + "; ".join(settings.approximations),
        "seed": seed,
        "noise": settings.noise,
        "sampler": {"family": settings.family} | {k: v for k, v in settings.values.items() if v is not None},
    }
    titles = [title_of(prompt, index) for index, prompt in enumerate(prompts)]
    return Trace(loaded.tokenizer, loaded.stop_ids, titles, facts, loaded.turn_ids)


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
