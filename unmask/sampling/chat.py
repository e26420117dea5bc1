"""A conversation with a model at a terminal: its turns, the commands that change it, what of it fits the context."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from unmask.config.sampler import SamplerConfig
from unmask.data.chat import ChatTemplate
from unmask.data.keys import is_blank
from unmask.data.template_source import template_names
from unmask.distributed.runtime import own_device, pick_device
from unmask.errors import ConfigError, DataError, SamplingError, choice_problem
from unmask.places import part_of, user_path
from unmask.sampling.generate import Generation, answer
from unmask.sampling.jobs import LoadedModel, load
from unmask.sampling.plan import JobPlan
from unmask.sampling.prompts import require_characters, room_for, template_of, template_problem
from unmask.sampling.settings import SamplerSettings
from unmask.sampling.text import unanswered_note
from unmask.sampling.view import watcher

# {"role", "content"}, and of an answer that was thought about "reasoning_content", as in training data.
Turn = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """What has been said, and how the next answer is sampled.

    `resolve` gives the settings in force where a caller wants others; it raises SamplingError.
    """

    resolve: Callable[[SamplerConfig], SamplerSettings]
    turns: tuple[Turn, ...] = ()  # a system turn (if any) first, otherwise user and assistant in turn
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    seed: int = 42
    forgotten: int = 0  # of the turns after the system's, how many of the oldest the model no longer sees

    @property
    def settings(self) -> SamplerSettings:
        """The settings in force."""
        return self.resolve(self.sampler)

    @property
    def system(self) -> tuple[Turn, ...]:
        """The system's turn, or nothing."""
        return tuple(turn for turn in self.turns[:1] if turn["role"] == "system")

    @property
    def seen(self) -> tuple[Turn, ...]:
        """The turns that the model sees: without what it thought, which templates show of the newest answer only."""
        shown = self.system + self.turns[len(self.system) + self.forgotten :]
        return tuple({"role": turn["role"], "content": turn["content"]} for turn in shown)

    @property
    def answered(self) -> tuple[Turn, ...]:
        """The turns that training can read: without exchanges whose answer is empty, all of it reasoning, say."""
        rest = self.turns[len(self.system) :]
        pairs = (pair for pair in zip(rest[::2], rest[1::2], strict=False) if not is_blank(pair[1]["content"]))
        return (*self.system, *(turn for pair in pairs for turn in pair))

    def say(self, role: str, content: str, reasoning: str | None = None) -> Conversation:
        """Return the conversation with one more turn."""
        thought = {"reasoning_content": reasoning} if reasoning else {}
        return dataclasses.replace(self, turns=(*self.turns, {"role": role, "content": content, **thought}))

    def fit(self, count: Callable[[Sequence[Turn]], int], room: int) -> Conversation:
        """Return the conversation, asked by its last turn, with the oldest exchanges forgotten until it fits.

        `count` gives the tokens of some turns' prompt, of which there is `room` for so many.

        Raises:
            SamplingError: the last turn does not fit even alone; names the lengths and the remedy.
        """
        fitted = self
        while (needed := count(fitted.seen)) > room:
            if len(fitted.seen) - len(self.system) < 3:  # an exchange and the question after it
                raise SamplingError(
                    f"this turn: {needed} tokens with the template, and the context has room for {room} beside the "
                    "answer; shorten it or lower --max_new_tokens"
                )
            fitted = dataclasses.replace(fitted, forgotten=fitted.forgotten + 2)
        return fitted


@dataclass(frozen=True)
class Outcome:
    """What a command did: the conversation after it, what to tell the user, and whether to leave."""

    conversation: Conversation
    note: str = ""
    leave: bool = False


@dataclass(frozen=True)
class Command:
    """One command: how it is spelt, with what it takes; its line of `/help`; and the function that does it."""

    usage: str
    help: str
    run: Callable[[Conversation, str], Outcome]


def is_command(line: str) -> bool:
    """Say whether a line is a command rather than a turn: it starts with one slash."""
    return line.startswith("/") and not line.startswith("//")


def as_turn(line: str) -> str:
    """Return the text of a line that is a turn; `//` at its start stands for a slash."""
    return line[1:] if line.startswith("//") else line


def run_command(conversation: Conversation, line: str) -> Outcome:
    """Run a line that is a command.

    Raises:
        SamplingError: an unknown command (with the nearest), or one without what it needs.
    """
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise SamplingError(f"{choice_problem(name, COMMANDS)}; a turn that starts with a slash is written //…")
    command, argument = COMMANDS[name], argument.strip()
    if argument and command.usage == name:
        raise SamplingError(f"{name}: takes nothing after it, got {argument!r}")
    return command.run(conversation, argument)


def save(conversation: Conversation, path: Path) -> int:
    """Add what was answered to a JSONL file as a row that training reads; return the file's number of rows.

    Raises:
        SamplingError: nothing has been answered yet, a path that is no .jsonl file, or one that cannot be written.
    """
    if len(conversation.answered) == len(conversation.system):
        raise SamplingError("/save: nothing has been answered yet, so there is no row to train on; ask something first")
    if path.suffix != ".jsonl":
        raise SamplingError(f"/save: {path} must end in .jsonl, one conversation a line; write /save FILE.jsonl")
    row = json.dumps({"messages": list(conversation.answered)}, ensure_ascii=False)
    try:
        written = path.read_bytes() if path.exists() else b""
        if written and not written.endswith(b"\n"):
            written += b"\n"
        with part_of(path) as part:
            part.write_bytes(written + row.encode() + b"\n")
    except OSError as error:
        raise SamplingError(f"/save: {path}: {error.strerror or error}; name a file that you may write") from None
    return sum(not line.isspace() for line in written.splitlines()) + 1


def _reset(conversation: Conversation, _: str) -> Outcome:
    return Outcome(dataclasses.replace(conversation, turns=conversation.system, forgotten=0), "a new conversation")


def _steps(conversation: Conversation, argument: str) -> Outcome:
    steps = _number("/steps", argument, 1)
    changed = dataclasses.replace(conversation, sampler=dataclasses.replace(conversation.sampler, steps=steps))
    before, after = conversation.settings, changed.settings
    if after.attention == "canvas":
        said = " a canvas at the most"
    elif after.rule != "quota":
        said = f"; not used while --{after.rule} is set"
    elif before.rule != "quota":
        said = f" an answer, in place of the preset's {before.rule} {getattr(before, before.rule)}"
    else:
        said = " an answer"
    return Outcome(changed, f"steps: {steps}{said}")


def _seed(conversation: Conversation, argument: str) -> Outcome:
    seed = _number("/seed", argument, 0)
    return Outcome(dataclasses.replace(conversation, seed=seed), f"seed: {seed}")


def _save(conversation: Conversation, argument: str) -> Outcome:
    if not argument:
        raise SamplingError("/save: name the file to add the conversation to: /save FILE.jsonl")
    try:
        path = user_path(argument, "/save")
    except ConfigError as error:  # a turn's mistake: the conversation goes on
        raise SamplingError(str(error)) from None
    rows = save(conversation, path)
    turns = len(conversation.answered)
    left_out = (
        f"; {len(conversation.turns) - turns} without an answer are left out" if turns < len(conversation.turns) else ""
    )
    return Outcome(conversation, f"{turns} turns added to {path} as row {rows}{left_out}")


def _help(conversation: Conversation, _: str) -> Outcome:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    return Outcome(conversation, "\n".join([*lines, f"{'//…':{width}}  a turn that starts with a slash"]))


def _quit(conversation: Conversation, _: str) -> Outcome:
    return Outcome(conversation, leave=True)


def _number(name: str, argument: str, least: int) -> int:
    if not (argument.isascii() and argument.isdecimal()) or int(argument) < least:
        raise SamplingError(f"{name}: write a whole number of at least {least} after it, got {argument!r}")
    return int(argument)


COMMANDS: dict[str, Command] = {
    "/reset": Command("/reset", "forget the conversation (a --system turn stays)", _reset),
    "/steps": Command("/steps N", "denoising steps of the next answers", _steps),
    "/seed": Command("/seed N", "seed of the next answers", _seed),
    "/save": Command("/save FILE.jsonl", "add the conversation to a file as a row that training reads", _save),
    "/help": Command("/help", "show the commands", _help),
    "/quit": Command("/quit", "leave, as Ctrl-D does; Ctrl-C stops an answer", _quit),
}


def converse(
    plan: JobPlan,
    sampler: SamplerConfig,
    seed: int,
    system: str | None,
    template: str | None,
    dtype: str | None,
    device: str,
) -> int:
    """Talk with a checkpoint at the terminal, or through a pipe; return the exit status. Arguments as the flags.

    Raises:
        SamplingError: no room for a question, no template that renders a conversation; through a pipe any mistake.
    """
    room = room_for(plan.config, plan.settings)
    if room < 1:
        most = plan.config.max_sequence_length
        raise SamplingError(
            f"--max_new_tokens: answers of {most - room} tokens leave no room for a question in the model's "
            f"max_sequence_length {most}; give less"
        )
    place = own_device(pick_device(device))
    conversation = Conversation(plan.resolve, sampler=sampler, seed=seed)
    if system is not None:
        require_characters(system, "--system")
        conversation = conversation.say("system", system)
    chat_template = _template(plan, template, conversation)  # refused before the weights load
    loaded = dataclasses.replace(load(plan, place, dtype), template=chat_template)
    talk = Talk(loaded, chat_template, Console(highlight=False), sys.stdin.isatty())
    if talk.interactive:
        talk.note(f"{plan.name}: /help lists the commands, Ctrl-D leaves")
    talk.note(plan.settings.note)
    if loaded.idle:
        talk.note(f"{loaded.idle}; give --dtype bfloat16")
    for line in plan.notes():
        talk.note(line)
    return talk.run(conversation)


def _template(plan: JobPlan, name: str | None, conversation: Conversation) -> ChatTemplate:
    """Return a chat template that is known to render a conversation."""
    try:
        template = template_of(plan.tokenizer, plan.config.mask_token_id, name)
        template.encode_prompt(conversation.say("user", "a").say("assistant", "b").say("user", "c").turns)
        return template
    except DataError as error:
        raise SamplingError(
            f"--chat_template: {template_problem(error)}; name {', '.join(template_names())} or a .jinja file that "
            "renders a conversation, or use `unmask generate --raw`"
        ) from None


@dataclass(frozen=True)
class Talk:
    """A conversation between standard input and a model.

    Where it is `interactive`, someone types: answers are drawn as they come, and mistakes are only reported.
    """

    loaded: LoadedModel
    template: ChatTemplate
    console: Console
    interactive: bool

    def run(self, conversation: Conversation) -> int:
        """Answer line after line until the input ends; return the exit status."""
        for line in self._lines():
            if is_blank(line):
                continue
            try:
                if is_command(line):
                    outcome = run_command(conversation, line.strip())
                    conversation = outcome.conversation
                    self.note(outcome.note)
                    if outcome.leave:
                        break
                else:
                    conversation = self._exchange(conversation, as_turn(line))
            except SamplingError as error:
                if not self.interactive:
                    raise
                self.console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 0

    def note(self, text: str) -> None:
        """Say something that is no answer; apart from the answers where those may be read by a program."""
        if text and self.interactive:
            self.console.print(text, style="dim", markup=False, soft_wrap=True)
        elif text:
            print(text, file=sys.stderr, flush=True)

    def _exchange(self, conversation: Conversation, question: str) -> Conversation:
        """Answer a turn; return the conversation with both, or as it was where the answer was interrupted."""
        require_characters(question, "this turn")
        asked = conversation.say("user", question)
        room = room_for(self.loaded.config, conversation.settings)
        fitted = asked.fit(lambda turns: len(self.template.encode_prompt(turns)), room)
        left_out = fitted.forgotten - asked.forgotten
        if left_out:
            self.note(f"the context is full: the oldest {left_out} turns are left out from now on")
        if not self.interactive:
            print(f"> {question}")
        try:
            reply = self._answer(fitted, self.template.encode_prompt(fitted.seen))
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.note("interrupted; the question and what was there of the answer are forgotten")
            return conversation
        self.note(unanswered_note(reply.text, reply.reasoning) or "")
        if self.interactive:
            stats = reply.stats
            rate = f"{stats.tokens_per_forward:.1f} a call"
            self.note(f"{len(reply.token_ids)} tokens, {stats.nfe} calls ({rate}), {stats.seconds:.1f} s")
        else:
            print(f"{reply.text}\n", flush=True)
        return fitted.say("assistant", reply.text or "", reply.reasoning)

    def _answer(self, conversation: Conversation, prompt_ids: list[int]) -> Generation:
        loaded, settings = self.loaded, conversation.settings
        if settings != loaded.settings:
            loaded = dataclasses.replace(loaded, settings=settings)
        with watcher(loaded, self.console) if self.interactive else contextlib.nullcontext() as draw:
            return answer(loaded, [prompt_ids], ["this turn"], conversation.seed, on_event=draw)[0]

    def _lines(self) -> Iterator[str]:
        if not self.interactive:
            for number, raw in enumerate(sys.stdin.buffer, start=1):
                try:
                    yield raw.decode().rstrip("\r\n")
                except UnicodeDecodeError:
                    raise SamplingError(f"standard input: line {number} is not UTF-8 text; convert it first") from None
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (imported, it gives input() line editing and a history)
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:  # at the prompt: the line is dropped, as a shell does
                print()
            except EOFError:
                print()
                return
