"""lm-evaluation-harness's model `unmask`: its requests, answered by the sampler and the likelihood estimates.

Every rank sees all requests and computes its share, so the results do not depend on the number of ranks; to the harness
there is one process. Imports the harness: use `unmask.evaluation.harness` where it may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from unmask.config.distributed import check_timeout
from unmask.config.reader import read_section
from unmask.config.sampler import SamplerConfig
from unmask.distributed.inference import divide_rows
from unmask.distributed.ranks import join
from unmask.distributed.runtime import own_device, pick_device
from unmask.errors import ConfigError, FieldError, SamplingError, choice_problem
from unmask.evaluation.canvas_likelihood import ar_log_likelihood
from unmask.evaluation.exact_match import cut_at, divide, greedily_written, rows_between_saves
from unmask.evaluation.likelihood import DEFAULT_SAMPLES, log_likelihoods, method_for
from unmask.evaluation.requests import Ids, RequestEncoder, UnscorableError, label_of, read_options
from unmask.sampling.generate import Generation, answer
from unmask.sampling.jobs import LoadedModel, as_loaded, load
from unmask.sampling.plan import plan_job
from unmask.sampling.text import split_reasoning

# Requests between two steps of the progress bar, and of the harness's own cache.
_PAIRS_AT_ONCE = 64
_MODEL_ARGS = "--model_args"

_LOG = logging.getLogger(__name__)

Scores = list[tuple[float, bool]]  # log-likelihood in nats, and whether greedy decoding writes the continuation
# Of a continuation that cannot be scored: it is never the most likely one.
UNSCORED: tuple[float, bool] = (-math.inf, False)


@dataclass(frozen=True)
class ModelArguments:
    """The harness's `--model_args` that are no sampler's, as the flags of `unmask eval`; it infers types from text.

    Attributes:
        device: None and `cuda:0`, the harness's default, take a CUDA device when there is one.
        num_samples: answers with fewer masks than that are summed exactly.
        check_greedy: find out whether greedy decoding writes a continuation, as tasks such as lambada need; False
            answers no.
        verify: False reads a run's files without comparing them with its manifest.
        timeout_minutes: how long a process waits for one that does not answer.
    """

    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    seed: int = 42
    num_samples: int = DEFAULT_SAMPLES
    antithetic: bool = False
    check_greedy: bool = True
    verify: bool = True
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        check_timeout(self.timeout_minutes)
        if self.device is not None and re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is None:
            raise FieldError("device", f"expected auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.num_samples < 1:
            raise FieldError("num_samples", f"must be at least 1, got {self.num_samples}")
        if self.antithetic and self.num_samples % 2:
            raise FieldError("num_samples", f"must be even with antithetic=True, got {self.num_samples}")


class UnmaskLM(LM):
    """A checkpoint as the harness sees it.

    `loglikelihood` is the Monte Carlo bound of `unmask.log_likelihood` for a model with mask noise, and the
    log-likelihood of the encoder, read from left to right, for one with a canvas.

    Args:
        pretrained: a folder, run directory or hub id; a network in memory, with its `tokenizer`; or a LoadedModel.
        max_batch_size: the harness's; there is no search for a batch size, so it must be None.
        arguments: fields of `ModelArguments` and of `SamplerConfig`.

    Raises:
        ConfigError: no checkpoint, an argument that is not known or of another type, or a batch size that is no number.
        SamplingError: a sampler's setting out of range.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        tokenizer: Any = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise ConfigError(f"{_MODEL_ARGS}: pretrained is missing; give a folder, a run directory or a hub id")
        if isinstance(pretrained, (bool, int, float)):
            raise ConfigError(
                f"{_MODEL_ARGS}: pretrained: {pretrained!r} is a number; write a folder as ./{pretrained}"
            )
        ours = [field.name for field in dataclasses.fields(ModelArguments)]
        sampler_fields = [field.name for field in dataclasses.fields(SamplerConfig)]
        for name in (*arguments, *(["tokenizer"] if tokenizer is not None and isinstance(pretrained, str) else [])):
            if name not in (*ours, *sampler_fields):
                known = ["pretrained", "batch_size", "max_batch_size", *ours, *sampler_fields]
                raise ConfigError(f"{_MODEL_ARGS}: {choice_problem(name, known)}")
        size = "1" if batch_size is None else str(batch_size)
        if max_batch_size is not None or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"--batch_size: {batch_size!r} is no number of rows, and none is searched for; give one, such as 16"
            )
        self.batch_size = None if batch_size is None else int(batch_size)
        given = {name: value for name, value in arguments.items() if name in ours}
        self.arguments = read_section(ModelArguments, given, _MODEL_ARGS)
        self.sampler = SamplerConfig(**{name: arguments[name] for name in arguments if name not in ours})
        if isinstance(pretrained, str):
            self.name = "+".join(name for name in (pretrained, self.arguments.adapter) if name is not None)
            self.loaded = _load(pretrained, self.arguments, self.sampler)
        elif isinstance(pretrained, LoadedModel):
            self.name, self.loaded = type(pretrained.model).__name__, pretrained
        else:
            self.name, self.loaded = type(pretrained).__name__, as_loaded(pretrained, tokenizer, self.sampler)
        self._continuations = method_for(CONTINUATIONS, self.loaded.model, "loglikelihood", "leave the task out")
        self._tokenizer: Any = self.loaded.tokenizer
        self.encoder = RequestEncoder(self._tokenizer, self.loaded.mask_id, self._continuations.needs_context)
        self._device = next(self.loaded.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Most positions that the model takes."""
        return self.loaded.config.max_sequence_length

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches what it rendered."""
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the source of the chat template, "" when none is asked for; one that is named is used from then on."""
        if not chat_template:
            return ""
        if isinstance(chat_template, str):
            self.encoder = dataclasses.replace(self.encoder, template_name=chat_template)
        self.loaded = dataclasses.replace(self.loaded, template=self.encoder.template)  # answers end as it closes them
        return self.encoder.template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a context whose tokens are those of `unmask.generate` (`RequestEncoder.chat`)."""
        return self.encoder.chat(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Scores:
        """Return (log-likelihood in nats, whether greedy decoding writes it) of each (context, continuation).

        A continuation that cannot be scored is named and has UNSCORED; the others are scored.
        """
        pairs = self._pairs(requests)
        numbers, scores = list(pairs), [UNSCORED] * len(requests)
        for part in self._parts(len(numbers), disable_tqdm, "loglikelihood"):
            found = self._scored([pairs[number] for number in numbers[part]], self.arguments.check_greedy)
            for number, score in zip(numbers[part], found, strict=True):
                scores[number] = score
                self.cache_hook.add_partial("loglikelihood", requests[number].args, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text, in windows of the model's length where it is longer."""
        totals: list[float] = []
        for part in self._parts(len(requests), disable_tqdm, "loglikelihood_rolling", 1):
            for request in requests[part]:
                windows = get_rolling_token_windows(
                    self.encoder.text(request.args[0]),
                    self.encoder.prefix,
                    max_seq_len=self.max_length - 1,
                    context_len=1,
                )
                pairs = [(tuple(context), tuple(tokens)) for context, tokens in map(make_disjoint_window, windows)]
                totals.append(sum(value for value, _ in self._scored(pairs, False)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes after each context, up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            # The harness declares arguments without a type.
            options = tuple(request.args)[1]  # pyright: ignore[reportGeneralTypeIssues]
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(index)
        # Options are refused before anything is answered.
        plans = {key: self._plan(requests[indices[0]], json.loads(key)) for key, indices in groups.items()}
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=self._silent(disable_tqdm), desc="generate_until") as bar:
            for key, indices in groups.items():
                written = self._generate([requests[index] for index in indices], *plans[key], bar)
                for index, text in zip(indices, written, strict=True):
                    texts[index] = text
        return texts

    def _plan(self, request: Instance, options: dict[str, Any]) -> tuple[LoadedModel, tuple[str, ...]]:
        """Return the model with the sampler of a task's requests, and their stop strings; raises ConfigError."""
        task = request.task_name
        read = read_options(task, options, self.sampler, self.loaded.settings, self.max_length)
        try:
            loaded = self.loaded.with_sampler(read.sampler)
        except SamplingError as error:
            raise ConfigError(f"{task}: generation_kwargs: {error}") from None
        length = loaded.settings.length
        if length >= self.max_length:
            raise ConfigError(
                f"{task}: generation_kwargs: an answer of {length} tokens leaves no room for the prompt in the model's "
                f"{self.max_length} positions; set a smaller max_new_tokens, as a flag or in {_MODEL_ARGS}"
            )
        return loaded, read.stops

    def _generate(
        self, requests: Sequence[Instance], loaded: LoadedModel, stops: Sequence[str], bar: tqdm
    ) -> list[str]:
        room = self.max_length - loaded.settings.length
        prompts = self._fitted([(self.encoder.context(request.args[0]), room) for request in requests])
        texts = [""] * len(prompts)
        for chunk in divide(prompts, loaded.ranks.size * rows_between_saves(self.batch_size)):

            def written(rows: list[int], seed: int = chunk.seed(self.arguments.seed)) -> list[str]:
                labels = [label_of(requests[row]) for row in rows]
                answers = answer(loaded, [list(prompts[row]) for row in rows], labels, seed, self.batch_size)
                return [self._said(each, stops) for each in answers]

            rows = list(chunk.rows)
            for row, text in zip(rows, divide_rows(rows, loaded.ranks, written, loaded.joint_calls), strict=True):
                texts[row] = text
                self.cache_hook.add_partial("generate_until", requests[row].args, text)
            bar.update(len(rows))
        return texts

    def _said(self, written: Generation, stops: Sequence[str]) -> str:
        """Return an answer's text up to the first stop string; control tokens, which no text has, are stops too."""
        known, text = self._tokenizer.get_added_vocab(), written.text
        ends = {known[stop] for stop in stops if stop in known}
        place = next((place for place, token in enumerate(written.token_ids) if token in ends), None)
        if place is not None:
            text = split_reasoning(written.token_ids[:place], self._tokenizer)[0]
        return cut_at(text or "", stops)

    def _pairs(self, requests: Sequence[Instance]) -> dict[int, tuple[Ids, Ids]]:
        """Return tokens of context and continuation by the request's number, of those that can be scored."""
        pairs: dict[int, tuple[list[int], Ids]] = {}
        for number, request in enumerate(requests):
            try:
                context, tokens = self.encoder.pair(*request.args)
                if len(tokens) >= self.max_length:
                    raise UnscorableError(f"{len(tokens)} tokens do not fit the model's {self.max_length} positions")
                pairs[number] = context, tuple(tokens)
            except UnscorableError as error:
                self._warn(f"{label_of(request)}: {error}; it is not scored")
        if len(pairs) < len(requests):
            left = len(requests) - len(pairs)
            self._warn(f"{left} of {len(requests)} requests could not be scored; their log-likelihood is given as -inf")
        fitted = self._fitted([(context, self.max_length - len(tokens)) for context, tokens in pairs.values()])
        return {number: (context, pairs[number][1]) for number, context in zip(pairs, fitted, strict=True)}

    def _fitted(self, contexts: Sequence[tuple[list[int], int]]) -> list[Ids]:
        """Return contexts cut on the left, each to the room that it has."""
        long = sum(len(ids) > room for ids, room in contexts)
        if long:
            self._warn(
                f"{long} of {len(contexts)} contexts do not fit the model's {self.max_length} positions beside what "
                "follows them; they lose their beginnings"
            )
        return [self.encoder.cut(ids, room) for ids, room in contexts]

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]], greedy: bool) -> Scores:
        def scored(rows: list[int]) -> Scores:
            return self._continuations.score(self, [pairs[row] for row in rows], greedy)

        return divide_rows(list(range(len(pairs))), self.loaded.ranks, scored, self.loaded.joint_calls)

    def _warn(self, text: str) -> None:
        if self.loaded.ranks.first:
            _LOG.warning(text)

    def _silent(self, disabled: bool) -> bool:
        return disabled or not self.loaded.ranks.first

    def _parts(self, total: int, disabled: bool, name: str, size: int = _PAIRS_AT_ONCE) -> Iterator[slice]:
        """Yield slices of a list, with a progress bar."""
        with tqdm(total=total, disable=self._silent(disabled), desc=name) as bar:
            for start in range(0, total, size):
                yield slice(start, min(start + size, total))
                bar.update(min(size, total - start))


def _load(name: str, arguments: ModelArguments, sampler: SamplerConfig) -> LoadedModel:
    plan = plan_job(name, sampler, arguments.adapter, f"{_MODEL_ARGS}: pretrained", arguments.verify)
    for note in plan.notes():
        _LOG.warning(note)
    # The harness's command line says cuda:0 when nobody said anything.
    device = own_device(pick_device("auto" if arguments.device in (None, "cuda:0") else arguments.device))
    return load(plan, device, arguments.dtype, join(device, arguments.timeout_minutes))


@dataclass(frozen=True)
class Continuations:
    """How models of one noise and attention score continuations, and whether a context must not be empty."""

    score: Callable[[UnmaskLM, Sequence[tuple[Ids, Ids]], bool], Scores]
    needs_context: bool


def _bounds(lm: UnmaskLM, pairs: Sequence[tuple[Ids, Ids]], greedy: bool) -> Scores:
    model, given = lm.loaded.model, lm.arguments
    options = {"batch_size": lm.batch_size, "antithetic": given.antithetic, "exact_if_cheaper": True}
    estimates = log_likelihoods(model, pairs, given.num_samples, given.seed, **options)
    written = greedily_written(model, pairs, lm.batch_size) if greedy else [False] * len(pairs)
    return [(each.value, same) for each, same in zip(estimates, written, strict=True)]


def _read_by_encoder(lm: UnmaskLM, pairs: Sequence[tuple[Ids, Ids]], greedy: bool) -> Scores:
    read = [ar_log_likelihood(lm.loaded.model, *pair) for pair in pairs]
    return [(each.value, each.greedy) for each in read]


# (noise, attention) → how a continuation is scored. A combination that is not here is refused.
CONTINUATIONS: dict[tuple[str, str], Continuations] = {
    ("mask", "bidirectional"): Continuations(_bounds, needs_context=False),
    ("uniform", "canvas"): Continuations(_read_by_encoder, needs_context=True),
}
