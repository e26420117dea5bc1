"""`unmask generate`: answer prompts with a checkpoint, or fill the blanks of texts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.config.flags import add_sampling_flags, command, flag, sampler_from
from unmask.errors import ConfigError, SamplingError

if TYPE_CHECKING:
    from unmask.config.sampler import SamplerConfig
    from unmask.distributed.ranks import Ranks
    from unmask.sampling.answer_file import AnswerFile
    from unmask.sampling.settings import Settings

_GENERATE_HELP = """\
A prompt is one user turn through the checkpoint's chat template; --raw takes it literally.
Sampling follows the published algorithm of the checkpoint's family. What no flag sets is the checkpoint's own
(generation_config.json), or its family's; a flag of another family is refused. What is not exact says so: in the flag's
help, and in each record.

Many prompts:  --input prompts.jsonl --output answers.jsonl   a line holds "prompt", "messages" or "prompt_ids"; an
               interrupted job goes on where it stopped when the same command is given again.
Blanks:        --infill --prompt "The capital of{blank:4} is Paris."   {blank:2-6} tries several lengths. A text with
               blanks is plain; in one with --raw a control token that is spelt out is that token.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "generate", run, "answer prompts with a checkpoint", _GENERATE_HELP)
    flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    flag(parser, "prompt", action="append", metavar="TEXT", help="may be given several times")
    flag(parser, "input", metavar="FILE.jsonl", help="prompts, one JSON object a line")
    flag(parser, "infill", action="store_true", help="fill the {blank:N}s of the prompts")
    flag(parser, "adapter", metavar="DIR", help="LoRA adapter to apply")
    add_sampling_flags(parser)
    flag(parser, "raw", action="store_true", help="take prompts literally: no chat template, control tokens as spelt")
    flag(parser, "seed", type=int, default=42, help="seed of the draws (default: %(default)s)")
    flag(parser, "batch_size", type=int, help="prompts denoised together (16)")
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    flag(parser, "device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    flag(parser, "nproc_per_node", type=int, metavar="N", help="processes to start on this machine; they share prompts")
    flag(parser, "shard", action="store_true", help="each process holds a part of the model, too big for one")
    flag(parser, "output", metavar="FILE.jsonl", help="write a record per answer instead of printing the texts")
    flag(parser, "watch", action="store_true", help="draw each answer while it is denoised, one after the other")
    flag(parser, "trace", metavar="FILE.html", help="write a page that replays how the answers came about")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.sampling.settings import default_settings, resolve

    sampler = sampler_from(arguments)
    prompts = _prompts(arguments)
    _check(arguments, sampler)
    from unmask.models.folders import find_folder, read_generation

    folder = str(find_folder(arguments.checkpoint, "--checkpoint"))
    from unmask.distributed.ranks import join
    from unmask.distributed.runtime import own_device, pick_device
    from unmask.models.registry import plan_folder
    from unmask.models.tokenizer import load_tokenizer, tokenizer_folder

    plan = plan_folder(folder, "--checkpoint")
    settings = resolve(sampler, default_settings(plan.config, read_generation(Path(folder))))
    source = tokenizer_folder(folder, arguments.adapter)
    if arguments.nproc_per_node not in (None, 1):
        from unmask.distributed.launch import relaunch

        return relaunch(arguments.words, arguments.nproc_per_node)
    device = own_device(pick_device(arguments.device))
    ranks = join(device)
    if ranks.first:
        _hint(arguments, prompts)
        _warn_of_base(arguments, folder)
    if ranks.size > 1 and (arguments.watch or arguments.trace):
        raise ConfigError("--watch and --trace show what one process does; start one, or leave them out")
    tokenizer = load_tokenizer(str(source), "--checkpoint")
    rows = _rows(arguments, prompts, tokenizer, plan.config, settings)
    job = _Job(arguments, list(prompts), list(prompts.values()), rows, tokenizer, sampler, settings)
    output = job.output(folder, ranks)
    from unmask.distributed.answering import load_for_answers

    model, together = load_for_answers(folder, arguments.dtype, device, arguments.adapter, ranks, arguments.shard)
    texts = _Texts(job) if ranks.first and output is None and (arguments.infill or not arguments.watch) else None
    try:
        # Of several processes one has not all answers before the end, and a live view is not to be written into.
        at_once = None if texts is None or ranks.size > 1 or arguments.watch else texts.add
        answers = job.answer(model, ranks, together, output, at_once)
        if output is not None:
            output.finish({row: job.record(row, answer) for row, answer in answers.items()})
        if texts is not None and at_once is None:
            for row, answer in answers.items():
                texts.add(row, answer)
    finally:
        if texts is not None:
            texts.close()
    if ranks.first:
        _report(arguments, job, output)
    return 0


def _prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the prompts by what to call each."""
    if arguments.input is None and arguments.prompt is None:
        raise ConfigError("give --prompt TEXT, once or several times, or --input FILE.jsonl")
    if arguments.input is not None and arguments.prompt is not None:
        raise ConfigError("--prompt and --input: prompts come from one of them; leave the other out")
    if arguments.input is not None:
        from unmask.sampling.prompt_file import read_prompts

        return read_prompts(Path(arguments.input), arguments.infill)
    texts: list[str] = list(arguments.prompt or ())
    if not all(text.strip() for text in texts):
        raise SamplingError("--prompt: the text is empty; write what the model should answer")
    return {f"prompt {index}": text for index, text in enumerate(texts)}


def _check(arguments: argparse.Namespace, sampler: SamplerConfig) -> None:
    """Refuse what can be told before anything is loaded."""
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise SamplingError(f"--batch_size: must be at least 1, got {arguments.batch_size}")
    for name in ("output", "trace"):
        value = getattr(arguments, name)
        if value is not None and not Path(value).absolute().parent.is_dir():
            raise ConfigError(f"--{name}: {Path(value).absolute().parent} is no folder; create it first")
        if value is not None and Path(value).is_dir():
            raise ConfigError(f"--{name}: {value} is a folder; name a file in it")
    if arguments.output is not None and Path(arguments.output).exists():
        raise ConfigError(f"--output: {arguments.output} is there already; name another file, or remove it")
    if arguments.infill:
        from unmask.sampling.infill import check_sampler

        check_sampler(sampler)
    if arguments.adapter is not None:
        from unmask.models.folders import find_adapter

        find_adapter(arguments.adapter)


def _hint(arguments: argparse.Namespace, prompts: dict[str, Any]) -> None:
    """Say that a blank is sent as text, where it probably was meant as one."""
    from unmask.sampling.blanks import has_blank

    where = [place for place, prompt in prompts.items() if isinstance(prompt, str) and has_blank(prompt)]
    if where and not arguments.infill:
        print(f"{where[0]}: its blank is text to the model; --infill fills blanks", file=sys.stderr)


def _warn_of_base(arguments: argparse.Namespace, folder: str) -> None:
    if arguments.adapter is not None:
        from unmask.models.folders import base_note, find_adapter

        note = base_note(find_adapter(arguments.adapter), Path(folder))
        if note:
            print(f"warning: --adapter: {note}", file=sys.stderr)


def _rows(
    arguments: argparse.Namespace, prompts: dict[str, Any], tokenizer: Any, config: Any, settings: Settings
) -> list[str]:
    """Return a text a prompt that says which tokens are asked for; refuse a prompt that cannot be answered."""
    from unmask.sampling.prompts import check_prompts, encode_given, encode_prompts
    from unmask.sampling.trials import trials_of, whole_text

    mask_id = getattr(config, "mask_token_id", None)
    if arguments.infill:
        texts = [encode_given(place, text, tokenizer, arguments.raw, mask_id) for place, text in prompts.items()]
        trials_of(texts, list(prompts), settings, config.max_sequence_length, config.rows, config.eos_token_id)
        return [str(whole_text(text)) for text in texts]
    rows = encode_prompts(list(prompts.values()), tokenizer, arguments.raw, mask_id, list(prompts))
    check_prompts(rows, list(prompts), config, settings)
    return [str(ids) for ids in rows]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is to be answered, and how.

    Attributes:
        arguments: of the command.
        places: what messages call each prompt.
        prompts: as `generate` or `infill` takes them.
        rows: for each, which tokens are asked for.
        tokenizer: the checkpoint's.
        sampler: the settings that were given.
        settings: those in force.
    """

    arguments: argparse.Namespace
    places: list[str]
    prompts: list[Any]
    rows: list[str]
    tokenizer: Any
    sampler: SamplerConfig
    settings: Settings

    def output(self, folder: str, ranks: Ranks) -> AnswerFile | None:
        """Return the file that the answers go to, if there is to be one; a collective."""
        if self.arguments.output is None:
            return None
        from unmask.evaluation.job import Checkpoint
        from unmask.models.folders import find_adapter
        from unmask.sampling.answer_file import AnswerFile

        adapter = None if self.arguments.adapter is None else str(find_adapter(self.arguments.adapter))
        identity = {
            **Checkpoint("", folder, adapter, folder).fingerprint(),
            **{name: getattr(self.arguments, name) for name in ("dtype", "infill", "raw", "seed")},
            "sampler": self._in_force(),
        }
        return AnswerFile(Path(self.arguments.output), self.rows, identity, ranks)

    def answer(
        self,
        model: Any,
        ranks: Ranks,
        together: AbstractContextManager,
        output: AnswerFile | None,
        show: Callable[[int, Any], None] | None,
    ) -> dict[int, Any]:
        """Answer what is not answered yet, divided among the ranks; each answer goes to the file as it comes, or to
        `show`, with the number of its prompt.
        """
        from unmask.distributed.rows import divide_rows, own_rows
        from unmask.report.progress import AnswerProgress

        todo = list(range(len(self.rows))) if output is None else output.open
        rows = [self.rows[row] for row in todo]
        mine = [todo[place] for place in own_rows(rows, ranks)]
        shown = ranks.first and output is not None and not self.arguments.watch
        with AnswerProgress(len(mine), shown) as progress, self._following(model, mine) as follow:

            def arrived(place: int, answer: Any) -> None:
                if output is not None:
                    output.add(mine[place], self.record(mine[place], answer))
                if show is not None:
                    show(mine[place], answer)
                progress.answered(len(answer.token_ids))

            def sample(_: list[str]) -> list[Any]:
                return self._sample(model, mine, on_answer=arrived, **follow)

            return dict(zip(todo, divide_rows(rows, ranks, sample, together), strict=True))

    def record(self, row: int, answer: Any) -> dict[str, Any]:
        """Return what is kept of an answer."""
        from unmask.sampling.answer_file import record_of

        return record_of(self.prompts[row], answer, self._in_force(), self.arguments.seed)

    def title(self, row: int) -> str:
        """Return what to print above an answer."""
        prompt = self.prompts[row]
        if isinstance(prompt, str):
            return prompt
        return prompt[-1]["content"] if isinstance(prompt[0], dict) else f"{len(prompt)} token ids"

    def _in_force(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.settings), "approximations": list(self.settings.approximations)}

    def _sample(self, model: Any, rows: list[int], **more: Any) -> list[Any]:
        from unmask.sampling.generate import generate
        from unmask.sampling.infill import infill

        arguments = self.arguments
        batch_size = 1 if arguments.watch else arguments.batch_size
        options = {"tokenizer": self.tokenizer, "sampler": self.sampler, "seed": arguments.seed, "raw": arguments.raw}
        options["labels"] = [self.places[row] for row in rows]
        prompts = [self.prompts[row] for row in rows]
        return (infill if arguments.infill else generate)(model, prompts, batch_size=batch_size, **options, **more)

    @contextmanager
    def _following(self, model: Any, rows: list[int]) -> Iterator[dict[str, Any]]:
        """Give the callbacks of the terminal and the trace for rows; write the trace in the end, of an error too."""
        arguments = self.arguments
        if not (arguments.watch or arguments.trace):
            yield {}
            return
        from unmask.sampling.jobs import as_loaded
        from unmask.sampling.trace import trace_for
        from unmask.sampling.view import watcher

        prompts = [self.prompts[row] for row in rows]
        loaded = as_loaded(model, self.tokenizer, self.sampler)
        trace = trace_for(loaded, prompts, checkpoint=arguments.checkpoint, seed=arguments.seed)
        titles = dict(enumerate(map(self.title, rows))) if len(self.rows) > 1 else {}
        events = 0
        with watcher(loaded, titles=titles) if arguments.watch else nullcontext() as draw:
            followers: list[Any] = [one for one in (draw, trace) if one is not None]

            def follow(event: Any) -> None:
                nonlocal events
                events += 1
                for one in followers:
                    one(event)

            def entitle(trials: list[str]) -> None:  # of a blank of unknown length there are several
                for one in followers:
                    one.entitle(trials)

            try:
                yield {"on_event": follow, **({"on_trials": entitle} if arguments.infill else {})}
            finally:
                if arguments.trace and events:
                    trace.write(Path(arguments.trace))
        if arguments.trace and events:
            print(f"wrote {arguments.trace}")


class _Texts:
    """Prints answers in the order of their prompts, each as soon as all before it are printed."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._ready: dict[int, Any] = {}
        self._next = 0

    def add(self, row: int, answer: Any) -> None:
        """Take an answer, and print those whose turn it is."""
        self._ready[row] = answer
        while self._next in self._ready:
            self._print(self._next)
            self._next += 1

    def close(self) -> None:
        """Print what still waited for others, which an interrupted run does not have."""
        for row in sorted(self._ready):
            self._print(row)

    def _print(self, row: int) -> None:
        from unmask.sampling.reasoning import unanswered_note
        from unmask.sampling.view import printable

        answer = self._ready.pop(row)
        text = printable(answer.text) if sys.stdout.isatty() else answer.text
        note = unanswered_note(answer.text, getattr(answer, "reasoning", None))  # texts filled in have none
        if note:
            print(f"{self._job.title(row)}: {note}", file=sys.stderr)
        print(f"> {self._job.title(row)}\n{text}\n" if len(self._job.rows) > 1 else text, flush=True)


def _report(arguments: argparse.Namespace, job: _Job, output: AnswerFile | None) -> None:
    from unmask.sampling.family_settings import approximation_note

    note = approximation_note(job.settings)
    if note:
        print(note, file=sys.stderr)
    if output is not None:
        kept = f", {len(output.kept)} of them from before" if output.kept else ""
        print(f"wrote {len(job.rows)} records to {arguments.output}{kept}")
