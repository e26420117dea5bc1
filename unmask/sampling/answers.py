"""`unmask generate`: prompts divided among ranks, answered, and printed, drawn or written down.

A record is on the disk as soon as its answer is there: while the job runs in `FILE.part`, of several processes in one
file each, and at the end in `FILE`, in the prompts' order. An interrupted job goes on with any number of processes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from unmask.distributed.inference import divide_rows, own_rows
from unmask.distributed.ranks import Ranks, from_first, join
from unmask.distributed.runtime import own_device, pick_device
from unmask.errors import ConfigError
from unmask.parsing import parse_json
from unmask.places import hold, lock_beside, read_bytes, user_path
from unmask.report.progress import AnswerProgress
from unmask.report.resumable import Kind, Record, append_records, as_line, resume_records, write_lines
from unmask.sampling.blanks import encode_blanks, has_blank
from unmask.sampling.engine.loop import StepEvent
from unmask.sampling.generate import Generation, answer
from unmask.sampling.infill import Infill, fill
from unmask.sampling.jobs import LoadedModel, load
from unmask.sampling.plan import GenerateRequest, JobPlan
from unmask.sampling.prompts import check_prompts, encode_prompts, title_of
from unmask.sampling.text import printable, unanswered_note
from unmask.sampling.trace import trace_for
from unmask.sampling.view import watcher

# What an answer file is of until it is whole.
_FILE = Kind("generation", lambda record: isinstance(record["text"], str))


def answer_all(
    plan: JobPlan, request: GenerateRequest, dtype: str | None, device: str, shard: bool, timeout_minutes: float = 30.0
) -> None:
    """Answer every prompt of a request; with several processes a collective.

    `dtype` and `shard` are as in `jobs.load`, `timeout_minutes` as in `ranks.join`.

    Raises:
        SamplingError: a prompt that cannot be answered, before the weights load; logits that are not finite.
        ConfigError: an output of another job; a view of several processes.
    """
    place = own_device(pick_device(device))
    ranks = join(place, timeout_minutes)
    if ranks.first:
        _hint(plan, request)
    if ranks.size > 1 and (request.watch or request.trace):
        raise ConfigError("--watch and --trace show what one process does; start one, or leave them out")
    job = _encode(plan, request)
    if request.output is None:
        _answer(job, None, ranks, place, dtype, shard)
        return
    path = user_path(request.output, "--output")
    with ExitStack() as stack:
        lock = hold(lock_beside(path), "--output", path, "writes")
        from_first(ranks, lambda: stack.enter_context(lock))
        output = AnswerFile(path, job.rows, job.identity(dtype), ranks)
        if not output.finished:
            _answer(job, output, ranks, place, dtype, shard)
        elif ranks.first:
            untraced = ", nor to trace" if request.trace else ""
            print(f"{path}: all {len(job.rows)} records of this job are there; nothing is left to do{untraced}")


def _answer(
    job: _Job, output: AnswerFile | None, ranks: Ranks, place: torch.device, dtype: str | None, shard: bool
) -> None:
    """Load the model, answer, and print, or write where there is an `output`."""
    plan, request = job.plan, job.request
    loaded = load(plan, place, dtype, ranks, shard)
    if loaded.idle and ranks.first:
        print(f"warning: {loaded.idle}; give --dtype bfloat16", file=sys.stderr)
    printer = None
    if ranks.first and output is None and (request.infill or not request.watch):
        # Of several processes one has not all answers before the end, and a live view is not to be written into.
        printer = Printer(job.titles, wait=ranks.size > 1 or request.watch)
    try:
        answers = _sample(job, loaded, output, printer)
        if output is not None:
            output.finish({row: job.record(row, each) for row, each in answers.items()})
        if printer is not None and printer.wait:
            for row, each in answers.items():  # all ranks'
                printer.add(row, each)
    finally:
        if printer is not None:
            printer.close()
    if not ranks.first:
        return
    note = plan.settings.note
    if note:
        print(note, file=sys.stderr)
    if output is not None:
        kept = f", {len(output.kept)} of them from before" if output.kept else ""
        print(f"wrote {len(job.rows)} records to {request.output}{kept}")


def _hint(plan: JobPlan, request: GenerateRequest) -> None:
    """Say that a blank is sent as text where it probably was meant as one, and what is odd about the files."""
    texts = [label for label, prompt in request.prompts.items() if isinstance(prompt, str) and has_blank(prompt)]
    if texts and not request.infill:
        print(f"{texts[0]}: its blank is text to the model; --infill fills blanks", file=sys.stderr)
    for note in plan.notes():
        print(f"warning: {note}", file=sys.stderr)


@dataclass(frozen=True)
class _Job:
    """What is to be answered; the lists have an entry a prompt. Two `rows` are equal where the same is asked."""

    plan: JobPlan
    request: GenerateRequest
    prompts: list[Any]
    labels: list[str]
    encoded: list[Any]
    rows: list[str]
    titles: list[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in force, and what of them is not computed by full forwards."""
        settings = self.plan.settings
        return {**settings.values, "approximations": list(settings.approximations)}

    def identity(self, dtype: str | None) -> dict[str, Any]:
        given = {name: getattr(self.request, name) for name in ("infill", "raw", "seed")}
        return {**self.plan.fingerprint(), "dtype": dtype, **given, "sampler": self.settings}

    def record(self, row: int, answered: Generation | Infill) -> Record:
        return record_of(self.prompts[row], answered, self.settings, self.request.seed)


def _encode(plan: JobPlan, request: GenerateRequest) -> _Job:
    """Return the prompts as tokens; raises SamplingError for one that cannot be answered."""
    labels, prompts = list(request.prompts), list(request.prompts.values())
    if request.infill:
        encoded = encode_blanks(prompts, labels, plan.tokenizer, request.raw, plan.config, plan.settings)
        rows = [str(text.hashed) for text in encoded]
    else:
        encoded = encode_prompts(prompts, plan.tokenizer, request.raw, plan.config.mask_token_id, labels)
        check_prompts(encoded, labels, plan.config, plan.settings)
        rows = [str(ids) for ids in encoded]
    titles = [title_of(prompt, index) for index, prompt in enumerate(prompts)]
    return _Job(plan, request, prompts, labels, encoded, rows, titles)


def _sample(job: _Job, loaded: LoadedModel, output: AnswerFile | None, printer: Printer | None) -> dict[int, Any]:
    """Answer what is not answered yet, divided among the ranks; return the answers by the numbers of their prompts."""
    request, ranks = job.request, loaded.ranks
    todo = list(range(len(job.rows))) if output is None else output.missing
    rows = [job.rows[row] for row in todo]
    mine = [todo[place] for place in own_rows(rows, ranks)]
    shown = ranks.first and output is not None and not request.watch
    with AnswerProgress(len(mine), shown) as progress, _following(job, loaded, mine) as follow:

        def arrived(place: int, answered: Any) -> None:
            if output is not None:
                output.add(mine[place], job.record(mine[place], answered))
            if printer is not None and not printer.wait:
                printer.add(mine[place], answered)
            progress.answered(len(answered.token_ids))

        def sample(_: list[str]) -> list[Any]:
            encoded, labels = [job.encoded[row] for row in mine], [job.labels[row] for row in mine]
            size = 1 if request.watch else request.batch_size
            return (fill if request.infill else answer)(loaded, encoded, labels, request.seed, size, follow, arrived)

        return dict(zip(todo, divide_rows(rows, ranks, sample, loaded.joint_calls), strict=True))


@contextmanager
def _following(job: _Job, loaded: LoadedModel, rows: list[int]) -> Iterator[Callable[[StepEvent], None] | None]:
    """Give what the terminal and the trace do with an event; write the trace in the end, of an error too."""
    request = job.request
    if not (request.watch or request.trace):
        yield None
        return
    titles = [job.titles[row] for row in rows]
    trace = trace_for(loaded, titles, checkpoint=job.plan.name, seed=request.seed) if request.trace else None
    headings = dict(enumerate(titles)) if len(job.rows) > 1 else {}
    with watcher(loaded, titles=headings) if request.watch else nullcontext() as draw:

        def follow(event: StepEvent) -> None:
            for follower in (draw, trace):
                if follower is not None:
                    follower(event)

        try:
            yield follow
        finally:
            written = trace is not None and trace.write(user_path(request.trace or "", "--trace"))
    if written:
        print(f"wrote {request.trace}")


class Printer:
    """Prints answers in the order of their prompts, each as soon as all before it are printed, or at `close` (`wait`).

    A title stands above each, where there are several.
    """

    def __init__(self, titles: Sequence[str], wait: bool) -> None:
        self.titles, self.wait = titles, wait
        self._ready: dict[int, Any] = {}
        self._next = 0

    def add(self, row: int, answered: Generation | Infill) -> None:
        """Take an answer, and print those whose turn it is."""
        self._ready[row] = answered
        while self._next in self._ready and not self.wait:
            self._print(self._next)
            self._next += 1

    def close(self) -> None:
        """Print what still waits: for the end, or for others that an interrupted run does not have."""
        for row in sorted(self._ready):
            self._print(row)

    def _print(self, row: int) -> None:
        answered = self._ready.pop(row)
        text = printable(answered.text) if sys.stdout.isatty() else answered.text
        note = unanswered_note(answered.text, getattr(answered, "reasoning", None))  # texts filled in have none
        if note:
            print(f"{self.titles[row]}: {note}", file=sys.stderr)
        print(f"> {self.titles[row]}\n{text}\n" if len(self.titles) > 1 else text, flush=True)


class AnswerFile:
    """The output of one job, with its `rows` and `identity`; all ranks that share it make one.

    Raises:
        ConfigError: `FILE` or `FILE.part` is of another job.
        CheckpointError: a file that cannot be written, in each method.
    """

    def __init__(self, path: Path, rows: Sequence[str], identity: Mapping[str, Any], ranks: Ranks) -> None:
        self.path, self.rows, self.ranks = path, rows, ranks
        self._file = self._part(ranks.rank)
        whole: dict[str, Any] = {**identity, "prompts": sha256("\n".join(rows).encode()).hexdigest()[:16]}

        self._job = sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

        def resume() -> list[Record]:
            if path.exists():
                return self._finished()
            others = sorted(set(path.parent.glob(f"{escape(path.name)}.part?*")) - {self._part(0)})
            others = [file for file in others if file.suffix.removeprefix(".part").isdigit()]
            return resume_records(self._part(0), _FILE, whole, self._units(), others)

        self.finished = bool(from_first(ranks, path.exists))
        self.kept = {record["row"]: record for record in from_first(ranks, resume)}
        if not ranks.first and not self.finished:
            write_lines(self._file, [json.dumps({_FILE.name: whole}, ensure_ascii=False)])

    @property
    def missing(self) -> list[int]:
        """Numbers of the prompts that have no answer yet."""
        return [row for row in range(len(self.rows)) if row not in self.kept]

    def add(self, row: int, record: Mapping[str, Any]) -> None:
        """Write an answer down."""
        append_records(self._file, [{"row": row, **record}])

    def finish(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        """Write the file, of the answers that were there and those of this run."""
        if self.ranks.first:
            found = {**self.kept, **{row: {"row": row, **record} for row, record in records.items()}}
            write_lines(self.path, [as_line({**found[row], "job": self._job}) for row in range(len(self.rows))])
        self.ranks.gather_results(None)  # a part is needed until the file is there
        self._file.unlink(missing_ok=True)

    def _finished(self) -> list[Record]:
        """Return the records of `FILE`, which must be all of this job's."""
        try:
            records = [parse_json(line, strict=False) for line in read_bytes(self.path).splitlines()]
            found = [(record["row"], record["job"]) for record in records]
            if found == [(row, self._job) for row in range(len(self.rows))]:
                return records
        except (OSError, ValueError, KeyError, TypeError):  # no file of ours
            pass
        raise ConfigError(
            f"--output: {self.path} is there already, and not of this job (its prompts, model, settings and seed); "
            "name another file, or remove it"
        )

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank or ''}")

    def _units(self) -> list[list[int]]:
        """Return equal rows together: what is drawn for one depends on how often it came before."""
        units: dict[str, list[int]] = {}
        for row, text in enumerate(self.rows):
            units.setdefault(text, []).append(row)
        return list(units.values())


def record_of(prompt: Any, answer: Generation | Infill, sampler: Mapping[str, Any], seed: int) -> Record:
    """Return what is kept of an answer: what was asked, what came out, and how."""
    made: Record = {"text": answer.text, "token_ids": answer.token_ids}
    if isinstance(answer, Infill):
        made |= {"fills": answer.fills, "fill_ids": answer.fill_ids, "log_likelihood": answer.log_likelihood}
    else:
        made |= {"reasoning": answer.reasoning, "finish_reason": answer.finish_reason}
    return {
        "prompt": prompt,
        **made,
        "seed": seed,
        "sampler": dict(sampler),
        "nfe": answer.stats.nfe,
        "tokens_per_forward": round(answer.stats.tokens_per_forward, 3),
        "tokens_per_second": round(answer.stats.tokens_per_second, 3),
    }
