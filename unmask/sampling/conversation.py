"""A conversation with a model, apart from any terminal: its turns and settings, the commands that change them, and
which turns still fit the model's context.

Needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError, choice_problem
from unmask.sampling.settings import CanvasSettings, MaskSettings, Settings, resolve

# {"role", "content"}, and of an answer that was thought about "reasoning_content", as in training data.
Turn = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """What has been said, and how the next answer is sampled.

    Attributes:
        turns: all turns, a system turn (if any) first, otherwise user and assistant in turn.
        sampler: settings of the next answer.
        seed: its seed.
        forgotten: of the turns after the system's, how many of the oldest the model no longer sees.
        defaults: what `sampler` is put into: the settings that the model has by itself.
    """

    turns: tuple[Turn, ...] = ()
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    seed: int = 42
    forgotten: int = 0
    defaults: Settings = dataclasses.field(default_factory=MaskSettings)

    @property
    def settings(self) -> Settings:
        """The settings in force; raises SamplingError where `sampler` does not suit the model."""
        return resolve(self.sampler, self.defaults)

    @property
    def system(self) -> tuple[Turn, ...]:
        """The system's turn, or nothing."""
        return tuple(turn for turn in self.turns[:1] if turn["role"] == "system")

    @property
    def seen(self) -> tuple[Turn, ...]:
        """The turns that the model sees: without what it thought, which templates show of the newest answer only."""
        shown = self.system + self.turns[len(self.system) + self.forgotten :]
        return tuple({"role": turn["role"], "content": turn["content"]} for turn in shown)

    def say(self, role: str, content: str, reasoning: str | None = None) -> Conversation:
        """Return the conversation with one more turn."""
        thought = {"reasoning_content": reasoning} if reasoning else {}
        return dataclasses.replace(self, turns=(*self.turns, {"role": role, "content": content, **thought}))

    def fit(self, count: Callable[[Sequence[Turn]], int], room: int) -> Conversation:
        """Return the conversation with as many of the oldest exchanges forgotten as must be.

        Args:
            count: the prompt's tokens of some turns; the last turn is the user's.
            room: tokens that a prompt may have.

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
    """What a command did.

    Attributes:
        conversation: the conversation after it.
        note: what to tell the user.
        leave: whether the conversation is over.
    """

    conversation: Conversation
    note: str = ""
    leave: bool = False


@dataclass(frozen=True)
class Command:
    """One command: how it is spelt, what it does, and the function that does it, given what follows its name."""

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
    return COMMANDS[name].run(conversation, argument.strip())


def save(conversation: Conversation, path: Path) -> int:
    """Add the conversation to a JSONL file as a row that training reads; return the file's number of rows.

    Raises:
        SamplingError: nothing has been answered yet, a path that is no .jsonl file, or one that cannot be written.
    """
    if not any(turn["role"] == "assistant" for turn in conversation.turns):
        raise SamplingError("/save: nothing has been answered yet, so there is no row to train on; ask something first")
    if path.suffix != ".jsonl":
        raise SamplingError(f"/save: {path} must end in .jsonl, one conversation a line; write /save FILE.jsonl")
    row = json.dumps({"messages": list(conversation.turns)}, ensure_ascii=False)
    try:
        written = path.read_bytes() if path.exists() else b""
        if written and not written.endswith(b"\n"):
            written += b"\n"
        temporary = path.with_name(path.name + ".part")
        temporary.write_bytes(written + row.encode() + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise SamplingError(f"/save: {path}: {error.strerror or error}; name a file that you may write") from None
    return sum(not line.isspace() for line in written.splitlines()) + 1


def _reset(conversation: Conversation, argument: str) -> Outcome:
    _refuse("/reset", argument)
    return Outcome(dataclasses.replace(conversation, turns=conversation.system, forgotten=0), "a new conversation")


def _steps(conversation: Conversation, argument: str) -> Outcome:
    steps = _number("/steps", argument, 1)
    changed = dataclasses.replace(conversation, sampler=dataclasses.replace(conversation.sampler, steps=steps))
    before, after = conversation.settings, changed.settings
    if isinstance(after, CanvasSettings):
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
    path = Path(argument).expanduser()
    rows = save(conversation, path)
    return Outcome(conversation, f"{len(conversation.turns)} turns added to {path} as row {rows}")


def _help(conversation: Conversation, argument: str) -> Outcome:
    _refuse("/help", argument)
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    return Outcome(conversation, "\n".join([*lines, f"{'//…':{width}}  a turn that starts with a slash"]))


def _quit(conversation: Conversation, argument: str) -> Outcome:
    _refuse("/quit", argument)
    return Outcome(conversation, leave=True)


def _refuse(name: str, argument: str) -> None:
    if argument:
        raise SamplingError(f"{name}: takes nothing after it, got {argument!r}")


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
