"""lm-evaluation-harness's model `unmask`: its requests, answered by the sampler and the likelihood estimates.

Every rank sees all requests and computes its share, so the results do not depend on the number of ranks; to the harness
there is one process. Imports the harness: use `unmask.evaluation.harness` where it may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from unmask.config.reader import read_section
from unmask.config.sampler import SamplerConfig
from unmask.distributed.inference import divide_rows
from unmask.distributed.ranks import join
from unmask.distributed.runtime import own_device, pick_device
from unmask.errors import ConfigError, FieldError, choice_problem
from unmask.evaluation.canvas_likelihood import ar_log_likelihood
from unmask.evaluation.exact_match import cut_at, divide, greedily_written, rows_between_saves
from unmask.evaluation.likelihood import DEFAULT_SAMPLES, log_likelihoods, method_for
from unmask.sampling.generate import answer
from unmask.sampling.jobs import LoadedModel, as_loaded, load
from unmask.sampling.plan import plan_job
from unmask.sampling.prompts import as_document, start_of_text

# Requests between two steps of the progress bar, and of the harness's own cache.
_PAIRS_AT_ONCE = 64
_MODEL_ARGS = "--model_args"

Ids = tuple[int, ...]
Scores = list[tuple[float, bool]]  # log-likelihood in nats, and whether greedy decoding writes the continuation


@dataclass(frozen=True)
class ModelArguments:
    """The harness's `--model_args` that are no sampler's, as the flags of `unmask eval`; it infers types from text.

    Attributes:
        device: None and `cuda:0`, the harness's default, take a CUDA device when there is one.
        num_samples: answers with fewer masks than that are summed exactly.
        check_greedy: find out whether greedy decoding writes a continuation, as tasks such as lambada need; False
            answers no.
    """

    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    seed: int = 42
    num_samples: int = DEFAULT_SAMPLES
    antithetic: bool = False
    check_greedy: bool = True

    def __post_init__(self) -> None:
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
        self._start = start_of_text(self._tokenizer)
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
        """Return the source of the chat template, "" when none is asked for."""
        if not chat_template:
            return ""
        if self._tokenizer.chat_template is None:
            raise ConfigError("--apply_chat_template: the checkpoint's tokenizer has no chat template; leave it out")
        return self._tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation."""
        return self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Scores:
        """Return (log-likelihood in nats, whether greedy decoding writes it) of each (context, continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        scores: Scores = []
        for part in self._parts(len(pairs), disable_tqdm, "loglikelihood"):
            scores += self._scored(pairs[part], self.arguments.check_greedy)
            for request, score in zip(requests[part], scores[part], strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text, in windows of the model's length where it is longer."""
        totals: list[float] = []
        for part in self._parts(len(requests), disable_tqdm, "loglikelihood_rolling", 1):
            for request in requests[part]:
                windows = get_rolling_token_windows(
                    self._encode(request.args[0]), self._prefix(), max_seq_len=self.max_length - 1, context_len=1
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
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=self._silent(disable_tqdm), desc="generate_until") as bar:
            for key, indices in groups.items():
                written = self._generate([requests[index] for index in indices], json.loads(key), bar)
                for index, text in zip(indices, written, strict=True):
                    texts[index] = text
        return texts

    def _generate(self, requests: Sequence[Instance], options: dict[str, Any], bar: tqdm) -> list[str]:
        loaded, until = self.loaded.with_sampler(self._sampler(options)), options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        length = loaded.settings.length
        if length >= self.max_length:
            raise ConfigError(
                f"max_gen_toks: an answer of {length} tokens leaves no room for the prompt in the model's "
                f"{self.max_length} positions; give max_new_tokens in {_MODEL_ARGS}"
            )
        documents = [as_document(self._encode(request.args[0]), self._tokenizer) for request in requests]
        prompts = [tuple(self._cut(document, self.max_length - length)) for document in documents]
        texts = [""] * len(prompts)
        for chunk in divide(prompts, loaded.ranks.size * rows_between_saves(self.batch_size)):

            def written(rows: list[int], seed: int = chunk.seed(self.arguments.seed)) -> list[str]:
                labels = [f"request {row}" for row in rows]
                answers = answer(loaded, [list(prompts[row]) for row in rows], labels, seed, self.batch_size)
                return [cut_at(each.text or "", stops) for each in answers]

            rows = list(chunk.rows)
            for row, text in zip(rows, divide_rows(rows, loaded.ranks, written, loaded.joint_calls), strict=True):
                texts[row] = text
                self.cache_hook.add_partial("generate_until", requests[row].args, text)
            bar.update(len(rows))
        return texts

    def _sampler(self, options: dict[str, Any]) -> SamplerConfig:
        """Return the settings of a task's requests; what --model_args set wins over the task."""
        wanted: dict[str, Any] = {}
        if options.get("max_gen_toks") is not None:
            wanted["max_new_tokens"] = int(options["max_gen_toks"])
        if options.get("do_sample") and options.get("temperature") and self.loaded.settings.temperature is not None:
            wanted["temperature"] = float(options["temperature"])
        return dataclasses.replace(self.sampler, **(wanted | self.sampler.given))

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]], greedy: bool) -> Scores:
        def scored(rows: list[int]) -> Scores:
            return self._continuations.score(self, [pairs[row] for row in rows], greedy)

        return divide_rows(list(range(len(pairs))), self.loaded.ranks, scored, self.loaded.joint_calls)

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Return the tokens of a context and its continuation, the context cut on the left where both are too long.

        Blanks at the context's end belong to the continuation's first token, as in the harness's own models.
        """
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        whole = self._encode(context + continuation)
        start = len(self._encode(context)) if context else 0
        prompt, tokens = as_document(whole[:start], self._tokenizer), whole[start:]
        if not prompt and self._continuations.needs_context:
            prompt = [self._prefix()]
        if len(tokens) >= self.max_length:
            raise ConfigError(
                f"a continuation of {len(tokens)} tokens does not fit the model's {self.max_length} positions; leave "
                "the task out"
            )
        return tuple(self._cut(prompt, self.max_length - len(tokens))), tuple(tokens)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """Return a context cut on the left to `room` tokens, at least one; the start of text stays before the rest."""
        kept = len(self._start) if ids[: len(self._start)] == self._start and room > len(self._start) else 0
        return ids if len(ids) <= room else ids[:kept] + ids[kept - room :]

    def _prefix(self) -> int:
        """Return the token that stands before a text without context."""
        bos = self._tokenizer.bos_token_id
        return bos if bos is not None else self._tokenizer.eos_token_id

    def _silent(self, disabled: bool) -> bool:
        return disabled or not self.loaded.ranks.first

    def _parts(self, total: int, disabled: bool, name: str, size: int = _PAIRS_AT_ONCE) -> Iterator[slice]:
        """Yield slices of a list, with a progress bar."""
        with tqdm(total=total, disable=self._silent(disabled), desc=name) as bar:
            for start in range(0, total, size):
                yield slice(start, min(start + size, total))
                bar.update(min(size, total - start))


def _load(name: str, arguments: ModelArguments, sampler: SamplerConfig) -> LoadedModel:
    plan = plan_job(name, sampler, arguments.adapter, f"{_MODEL_ARGS}: pretrained")
    # The harness's command line says cuda:0 when nobody said anything.
    device = own_device(pick_device("auto" if arguments.device in (None, "cuda:0") else arguments.device))
    return load(plan, device, arguments.dtype, join(device))


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
