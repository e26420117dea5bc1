"""Turns lm-evaluation-harness's requests into tokens and sampler settings.

The harness stores a rendered chat as one string, in which a control token from the template looks like one that a
question spells. So `RequestEncoder.chat` gives it the pieces that are tokenised apart, each behind a private-use
character, with a spelt control token cut into two pieces. The tokens are then those of `unmask generate`. Any other
context is literal text, in which control tokens are control tokens, as in the harness's own models; the mask is an
exception, and is ordinary characters everywhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from unmask.config.sampler import SamplerConfig
from unmask.data.chat import ChatTemplate
from unmask.data.renderings import control_pattern, literal_pieces
from unmask.errors import ConfigError, DataError, SamplingError, nearest
from unmask.sampling.prompts import as_document, start_of_text, template_of, template_problem
from unmask.sampling.settings import SamplerSettings

Ids = tuple[int, ...]

# Tokens of an answer if neither the task nor --model_args says how many: the harness's own default.
DEFAULT_LENGTH = 256
# Options that the sampler does not have → the values that change nothing, which are accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
}
# _PIECE starts each piece of a chat. Where the text of a piece has one of the two characters, it is escaped.
_PIECE, _ESCAPE = "\ue0f2", "\ue0f3"
_ESCAPED = {_ESCAPE: f"{_ESCAPE}0", _PIECE: f"{_ESCAPE}1"}


class UnscorableError(ValueError):
    """A continuation that has no likelihood; the text says why."""


def label_of(request: Instance) -> str:
    """Return what messages call a request."""
    return f"{request.task_name or request.request_type}, document {request.doc_id}, request {request.idx}"


@dataclass(frozen=True)
class Options:
    """How the requests of a task are sampled, and the strings at which an answer is cut."""

    sampler: SamplerConfig
    stops: tuple[str, ...]


def read_options(
    task: str | None, given: Mapping[str, Any], asked: SamplerConfig, settings: SamplerSettings, longest: int
) -> Options:
    """Return the options of a task's `generation_kwargs`, in any of the harness's spellings.

    They may include settings of our sampler. A sampler with a temperature schedule (t_max to t_min) keeps it.

    Args:
        task: its name, for messages.
        given: its `generation_kwargs`.
        asked: the settings of --model_args, which win over the task's.
        settings: those that apply if the task says nothing.
        longest: the model's maximum sequence length.

    Raises:
        ConfigError: an option that the sampler does not have, or a value out of range; names task and option.
    """
    where = f"{task}: generation_kwargs"
    try:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), min(DEFAULT_LENGTH, max(1, longest // 2))))
        temperature = float(options.pop("temperature", 0.0))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}; give numbers for length and temperature") from None
    stops = [stop for stop in options.pop("until") if stop is not None]
    sampled = options.pop("do_sample")
    if not all(isinstance(stop, str) for stop in stops) or not isinstance(sampled, bool):
        raise ConfigError(f"{where}: until must be a text or a list of them and do_sample true or false, got {given}")
    wanted: dict[str, Any] = {"max_new_tokens": options.pop("max_gen_toks")}
    if settings.temperature is not None:
        if sampled and temperature == 0 and asked.temperature is None:
            raise ConfigError(f"{where}.do_sample: true needs a temperature above 0; add one, or set do_sample: false")
        wanted["temperature"] = temperature if sampled or temperature < 0 else 0.0
    elif sampled and temperature and asked.t_min is None and asked.t_max is None:
        raise ConfigError(
            f"{where}.temperature: {settings.family}'s sampler goes from t_max to t_min and takes no {temperature}; "
            "set t_min and t_max, as flags or in --model_args, or take it out"
        )
    ours = [field.name for field in fields(SamplerConfig)]
    for name, value in options.items():
        if name in ours:
            wanted[name] = value
        elif value not in _NEUTRAL.get(name, ()):
            known = ["until", "max_gen_toks", "do_sample", *ours]
            raise ConfigError(
                f"{where}.{name}: {value!r} would be lost, since the sampler has no {name}{nearest(name, known)}; "
                "take it out of the task"
            )
    try:
        return Options(SamplerConfig(**(wanted | asked.given)), tuple(stops))
    except SamplingError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclass(frozen=True)
class RequestEncoder:
    """Turns the texts of requests into tokens.

    Attributes:
        tokenizer: the model's.
        mask_id: the model's mask token, which no text can spell.
        needs_context: whether an empty context becomes the token `prefix`.
        template_name: of one of the tokenizer's or our chat templates, or a path; None = the tokenizer's default.
    """

    tokenizer: Any
    mask_id: int | None
    needs_context: bool
    template_name: str | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; raises ConfigError where there is none."""
        tokenizer, name = self.tokenizer, self.template_name
        if isinstance(tokenizer.chat_template, dict) and name in tokenizer.chat_template:
            tokenizer, name = copy.copy(tokenizer), None
            tokenizer.chat_template = self.tokenizer.chat_template[self.template_name]
        try:
            return template_of(tokenizer, self.mask_id, name)
        except DataError as error:
            raise ConfigError(f"--apply_chat_template: {template_problem(error)}; leave it out") from None

    @cached_property
    def _mask(self) -> re.Pattern[str] | None:
        """Matches the mask token in literal text, where no task means a position to be filled in."""
        mask = None if self.mask_id is None else self.tokenizer.convert_ids_to_tokens(self.mask_id)
        return control_pattern([mask]) if isinstance(mask, str) else None

    @cached_property
    def start(self) -> list[int]:
        """The tokens before every literal text, such as BOS."""
        return start_of_text(self.tokenizer)

    @property
    def prefix(self) -> int:
        """The token that takes the place of an empty context."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.tokenizer.eos_token_id

    def chat(self, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a context: its pieces in one string, which `context` and `pair` take apart again.

        Without a generation prompt the last turn is the start of the answer.

        Raises:
            ConfigError: the template refuses the conversation, or there is none.
        """
        begun = [] if add_generation_prompt else [turns[-1]]
        try:
            pieces = self.template.prompt_pieces(turns[: len(turns) - len(begun)])
        except DataError as error:
            raise ConfigError(
                f"--apply_chat_template: {template_problem(error)}; leave it out, or change the task's description, "
                "--system_instruction or --fewshot_as_multiturn"
            ) from None
        pieces += self.template.literal_pieces(begun[0]["content"]) if begun else [""]
        return "".join(
            _PIECE + re.sub(f"[{_PIECE}{_ESCAPE}]", lambda found: _ESCAPED[found[0]], each) for each in pieces
        )

    def context(self, text: str) -> list[int]:
        """Return the tokens of a context for generation; at least one."""
        before, literal = _pieces(text)
        if before:
            return self._encode([*before, literal])
        return as_document(self.text(literal), self.tokenizer) or [self.prefix]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of its continuation.

        Blanks at the end of the context move to the continuation, as in the harness's own models. Where a token would
        straddle the two, the continuation is encoded by itself.

        Raises:
            UnscorableError: nothing to score.
        """
        if not continuation:
            raise UnscorableError("its continuation is empty")
        before, text = _pieces(context)
        blanks = len(text) - len(text.rstrip())
        if blanks:
            text, continuation = text[:-blanks], text[-blanks:] + continuation
        first, whole, apart = (
            self._encode(self.template.literal_pieces(each)) if before else self.text(each)
            for each in (text, text + continuation, continuation)
        )
        tokens = whole[len(first) :] if whole[: len(first)] == first else apart
        if not tokens:
            raise UnscorableError(f"the tokenizer makes no tokens of its continuation {continuation!r}")
        if before:
            return self._encode(before) + first, tokens
        prompt = as_document(first, self.tokenizer)
        return prompt if prompt or not self.needs_context else [self.prefix], tokens

    def text(self, text: str) -> list[int]:
        """Return the tokens of a literal text, without those of `start`."""
        return self._encode([text] if self._mask is None else literal_pieces(text, self._mask))

    def cut(self, ids: Sequence[int], room: int) -> Ids:
        """Return the last `room` tokens of a context, `room` ≥ 1; tokens of `start` stay in front."""
        if len(ids) <= room:
            return tuple(ids)
        kept = len(self.start) if list(ids[: len(self.start)]) == self.start and room > len(self.start) else 0
        return (*ids[:kept], *ids[kept - room :])

    def _encode(self, pieces: Sequence[str]) -> list[int]:
        return [token for piece in pieces for token in self.tokenizer.encode(piece, add_special_tokens=False)]


def _pieces(context: str) -> tuple[list[str], str]:
    """Return the pieces of a chat but the last ([] for a literal context), and the last, which the answer continues."""
    if not context.startswith(_PIECE):
        return [], context
    written = {escaped: character for character, escaped in _ESCAPED.items()}
    pieces = [re.sub(f"{_ESCAPE}[01]", lambda found: written[found[0]], piece) for piece in context[1:].split(_PIECE)]
    return pieces[:-1], pieces[-1]
