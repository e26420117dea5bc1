"""`unmask chat`: a conversation in the terminal, in which answers appear as they are denoised."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.config.flags import add_sampling_flags, command, flag, sampler_from
from unmask.errors import ConfigError, DataError, SamplingError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from unmask.data.chat import ChatTemplate
    from unmask.sampling.conversation import Conversation
    from unmask.sampling.generate import Generation

_CHAT_HELP = """\
Each line is a turn; /help lists the commands (/reset, /steps N, /seed N, /save FILE.jsonl, /quit). Ctrl-C stops an
answer, Ctrl-D leaves. The oldest turns are left out, with a note, once the conversation is longer than the model's
context. Where the input is no terminal every line is answered in turn and a mistake ends the run.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "chat", run, "talk with a checkpoint and see its answers being denoised", _CHAT_HELP)
    flag(parser, "checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="folder, run directory or hub id")
    flag(parser, "adapter", metavar="DIR", help="LoRA adapter to apply")
    flag(parser, "system", metavar="TEXT", help="a system turn before the conversation")
    flag(
        parser,
        "chat_template",
        metavar="NAME_OR_FILE",
        help="llada, diffusion_gemma or a .jinja file (default: the tokenizer's own)",
    )
    add_sampling_flags(parser)
    flag(parser, "seed", type=int, default=42, help="seed of the draws (default: %(default)s)")
    flag(parser, "dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    flag(parser, "device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    from unmask.distributed.ranks import world_size
    from unmask.sampling.settings import default_settings, resolve

    if world_size() > 1:
        raise ConfigError("chat: one terminal talks with one process; start it without a launcher")
    sampler = sampler_from(arguments)
    from unmask.models.folders import find_folder, read_generation

    adapter = None
    if arguments.adapter is not None:
        from unmask.models.folders import find_adapter

        adapter = find_adapter(arguments.adapter)
    folder = str(find_folder(arguments.checkpoint, "--checkpoint"))
    from unmask.distributed.runtime import own_device, pick_device
    from unmask.models.loading import load_model
    from unmask.models.registry import plan_folder
    from unmask.models.tokenizer import load_tokenizer, tokenizer_folder
    from unmask.sampling.conversation import Conversation
    from unmask.sampling.family_settings import approximation_note

    plan = plan_folder(folder, "--checkpoint")
    defaults = default_settings(plan.config, read_generation(Path(folder)))
    settings = resolve(sampler, defaults)
    context = plan.config.max_sequence_length
    if settings.length >= context:
        raise SamplingError(
            f"--max_new_tokens: answers of {settings.length} tokens leave no room for a question in the model's "
            f"max_sequence_length {context}; give less"
        )
    device = own_device(pick_device(arguments.device))
    tokenizer = load_tokenizer(str(tokenizer_folder(folder, arguments.adapter)), "--checkpoint")
    conversation = Conversation(sampler=sampler, seed=arguments.seed, defaults=defaults)
    if arguments.system is not None:
        conversation = conversation.say("system", arguments.system)
    _template(tokenizer, arguments.chat_template, None, conversation)  # refused before the weights load
    model = load_model(folder, arguments.dtype, device, arguments.adapter)
    from rich.console import Console

    from unmask.sampling.backends.backend import backend_for

    spec = backend_for(model).spec
    template = _template(tokenizer, arguments.chat_template, spec.mask_id, conversation)
    console = Console(highlight=False)
    talk = Talk(model, tokenizer, template, spec.max_length, console, sys.stdin.isatty())
    if talk.interactive:
        talk.note(f"{arguments.checkpoint}: /help lists the commands, Ctrl-D leaves")
    talk.note(approximation_note(settings))
    if adapter is not None:
        from unmask.models.folders import base_note

        talk.note(base_note(adapter, Path(folder)))
    return talk.run(conversation)


def _template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, mask_id: int | None, conversation: Conversation
) -> ChatTemplate:
    """Return a chat template that is known to render a conversation."""
    from unmask.data.chat import load_template
    from unmask.sampling.prompts import template_problem

    try:
        controls = () if mask_id is None else (mask_id,)
        template = load_template(tokenizer, name, controls, for_training=False)
        template.encode_prompt(conversation.say("user", "a").say("assistant", "b").say("user", "c").turns)
        return template
    except DataError as error:
        raise SamplingError(
            f"--chat_template: {template_problem(error)}; name llada, diffusion_gemma or a .jinja file that renders a "
            "conversation, or use `unmask generate --raw`"
        ) from None


@dataclass(frozen=True)
class Talk:
    """A conversation between standard input and a model.

    Attributes:
        model, tokenizer, template: what answers, and how turns become its tokens.
        context: longest prompt and answer together, in tokens.
        console: where answers go.
        interactive: whether someone types: then answers are drawn as they come and mistakes are only reported.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    context: int
    console: Console
    interactive: bool

    def run(self, conversation: Conversation) -> int:
        """Answer line after line until the input ends; return the exit status."""
        from unmask.sampling.conversation import as_turn, is_command, run_command

        for line in self._lines():
            if not line.strip():
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
        if not text:
            return
        if self.interactive:
            self.console.print(text, style="dim", markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _exchange(self, conversation: Conversation, question: str) -> Conversation:
        """Answer a turn; return the conversation with both, or as it was where the answer was interrupted."""
        from unmask.sampling.reasoning import unanswered_note

        settings = conversation.settings
        asked = conversation.say("user", question)
        fitted = asked.fit(lambda turns: len(self.template.encode_prompt(turns)), self.context - settings.length)
        left_out = fitted.forgotten - asked.forgotten
        if left_out:
            self.note(f"the context is full: the oldest {left_out} turns are left out from now on")
        if not self.interactive:
            print(f"> {question}")
        try:
            answer = self._answer(fitted, self.template.encode_prompt(fitted.seen))
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.note("interrupted; the question and what was there of the answer are forgotten")
            return conversation
        self.note(unanswered_note(answer.text, answer.reasoning) or "")
        if self.interactive:
            stats = answer.stats
            rate = f"{stats.tokens_per_forward:.1f} a call"
            self.note(f"{len(answer.token_ids)} tokens, {stats.nfe} calls ({rate}), {stats.seconds:.1f} s")
        else:
            print(f"{answer.text}\n", flush=True)
        return fitted.say("assistant", answer.text or "", answer.reasoning)

    def _answer(self, conversation: Conversation, prompt_ids: list[int]) -> Generation:
        from unmask.sampling.generate import generate
        from unmask.sampling.jobs import as_loaded
        from unmask.sampling.view import watcher

        options: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "sampler": conversation.sampler,
            "seed": conversation.seed,
        }
        if not self.interactive:
            return generate(self.model, prompt_ids, **options)[0]
        with watcher(as_loaded(self.model, self.tokenizer, conversation.sampler), self.console) as draw:
            return generate(self.model, prompt_ids, on_event=draw, **options)[0]

    def _lines(self) -> Iterator[str]:
        """Yield lines of the input without their ends."""
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
