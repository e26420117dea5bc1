"""lm-evaluation-harness's model `unmask`: its requests, answered by the sampling engine and the likelihood estimates.

Every rank sees all requests and computes its share, so the results do not depend on the number of ranks; to the harness
there is one process. Imports the harness: use `unmask.evaluation.harness` where it may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from unmask.config.reader import read_section
from unmask.config.sampler import SamplerConfig
from unmask.distributed.inference import divide_rows
from unmask.distributed.ranks import ALONE, Ranks
from unmask.errors import ConfigError, FieldError, choice_problem
from unmask.evaluation.canvas_likelihood import ar_log_likelihood, has_canvases
from unmask.evaluation.exact_match import cut_at, divide, rows_between_saves
from unmask.evaluation.greedy import greedily_written
from unmask.evaluation.likelihood import DEFAULT_SAMPLES, log_likelihoods
from unmask.sampling.prompts import as_document, start_of_text

# Requests between two steps of the progress bar, and of the harness's own cache.
_PAIRS_AT_ONCE = 64
_OWN = ("pretrained", "adapter", "dtype", "device", "batch_size", "max_batch_size", "seed", "num_samples", "antithetic",
        "check_greedy")  # fmt: skip

Ids = tuple[int, ...]


@dataclass(frozen=True)
class ModelArguments:
    """The harness's `--model_args` that are no sampler's, as `UnmaskLM` has them; it infers their types from text."""

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

    `loglikelihood` is the Monte Carlo bound of `unmask.log_likelihood` for a model with a mask token, and the
    log-likelihood of the encoder, read from left to right, for one with canvases.

    Args:
        pretrained: a folder, run directory or hub id; or a loaded model, with its `tokenizer`.
        tokenizer: of a loaded model.
        adapter: LoRA adapter to apply.
        dtype: `float32`, `bfloat16` or `float16`; None = as stored.
        device: `cpu` or `cuda`; None and `cuda:0`, the harness's default, take a CUDA device when there is one.
        batch_size: rows that the network sees at once; None = 16.
        max_batch_size: the harness's; there is no search for a batch size, so it must be None.
        seed: of sampling and of the masks.
        num_samples: masks of a likelihood estimate; answers with fewer masks than that are summed exactly.
        antithetic: draw masks in complementary pairs.
        check_greedy: find out whether greedy decoding writes the continuation, which accuracies of tasks such as
            lambada need; False answers no.
        ranks, together: for a loaded model: among whom requests are divided, and the context of their calls.
        sampler: fields of `SamplerConfig`.

    Raises:
        ConfigError: no checkpoint, an argument that is not known or of another type, or a batch size that is no number.
        SamplingError: a sampler's setting out of range.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        tokenizer: Any = None,
        adapter: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        seed: int = 42,
        num_samples: int = DEFAULT_SAMPLES,
        antithetic: bool = False,
        check_greedy: bool = True,
        ranks: Ranks = ALONE,
        together: AbstractContextManager[Any] | None = None,
        **sampler: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise ConfigError("--model_args: pretrained is missing; give a folder, a run directory or a hub id")
        if isinstance(pretrained, (bool, int, float)):
            raise ConfigError(f"--model_args: pretrained: {pretrained!r} is a number; write a folder as ./{pretrained}")
        known = [field.name for field in dataclasses.fields(SamplerConfig)]
        beside_a_model = {"tokenizer": tokenizer, "together": together, "ranks": None if ranks is ALONE else ranks}
        strange = [name for name, value in beside_a_model.items() if value is not None]
        for name in (*sampler, *(strange if isinstance(pretrained, str) else ())):
            if name not in known:
                raise ConfigError(f"--model_args: {choice_problem(name, [*_OWN, *known])}")
        size = "1" if batch_size is None else str(batch_size)
        if max_batch_size is not None or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"--batch_size: {batch_size!r} is no number of rows, and none is searched for; give one, such as 16"
            )
        values = {"adapter": adapter, "dtype": dtype, "device": device, "seed": seed, "num_samples": num_samples,
                  "antithetic": antithetic, "check_greedy": check_greedy}  # fmt: skip
        given = read_section(ModelArguments, values, "--model_args")
        self.sampler = SamplerConfig(**sampler)
        self.batch_size = None if batch_size is None else int(batch_size)
        self.seed, self.num_samples = given.seed, given.num_samples
        self.antithetic, self.check_greedy = given.antithetic, given.check_greedy
        self.ranks, self.together = ranks, together or nullcontext()
        if isinstance(pretrained, str):
            self.name = pretrained if adapter is None else f"{pretrained}+{adapter}"
            self.model, self.tokenizer, self.ranks = _load(pretrained, adapter, dtype, device)
        else:
            self.name, self.model, self.tokenizer = type(pretrained).__name__, pretrained, tokenizer
        self._start = start_of_text(self.tokenizer)
        self._device = next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Most positions that the model takes."""
        return self.model.config.max_sequence_length

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches what it rendered."""
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the source of the chat template, "" when none is asked for."""
        if not chat_template:
            return ""
        if self.tokenizer.chat_template is None:
            raise ConfigError("--apply_chat_template: the checkpoint's tokenizer has no chat template; leave it out")
        return self.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding writes it) of each (context, continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        found: list[tuple[float, bool]] = []
        for part in _parts(len(pairs), disable_tqdm or not self.ranks.first, "loglikelihood"):
            found += self._scored(pairs[part], self.check_greedy)
            for request, result in zip(requests[part], found[part], strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text, in windows of the model's length where it is longer."""
        found: list[float] = []
        for part in _parts(len(requests), disable_tqdm or not self.ranks.first, "loglikelihood_rolling", 1):
            for request in requests[part]:
                windows = get_rolling_token_windows(
                    self._encode(request.args[0]), self._prefix(), max_seq_len=self.max_length - 1, context_len=1
                )
                pairs = [(tuple(context), tuple(tokens)) for context, tokens in map(make_disjoint_window, windows)]
                total = sum(value for value, _ in self._scored(pairs, False))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
                found.append(total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes after each context, up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(_second(request), sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or not self.ranks.first, desc="generate_until") as bar:
            for key, indices in groups.items():
                self._generate([requests[index] for index in indices], indices, json.loads(key), texts, bar)
        return texts

    def _generate(
        self, requests: Sequence[Instance], indices: Sequence[int], options: dict[str, Any], texts: list[str], bar: tqdm
    ) -> None:
        from unmask.sampling.generate import generate
        from unmask.sampling.settings import settings_for

        sampler, stops = self._sampler(options), _stops(options)
        room = self.max_length - settings_for(self.model, sampler).length
        if room < 1:
            raise ConfigError(
                f"max_gen_toks: an answer of {self.max_length - room} tokens leaves no room for the prompt in the "
                f"model's {self.max_length} positions; give max_new_tokens in --model_args"
            )
        asked = [tuple(self._cut(self._document(request.args[0]), room)) for request in requests]
        for chunk in divide(asked, self.ranks.size * rows_between_saves(self.batch_size)):

            def written(rows: list[int], seed: int = chunk.seed(self.seed)) -> list[str]:
                prompts = [list(asked[row]) for row in rows]
                answers = generate(
                    self.model,
                    prompts,
                    tokenizer=self.tokenizer,
                    sampler=sampler,
                    seed=seed,
                    batch_size=self.batch_size,
                )
                return [cut_at(answer.text or "", stops) for answer in answers]

            found = divide_rows(list(chunk.rows), self.ranks, written, self.together)
            for row, text in zip(chunk.rows, found, strict=True):
                texts[indices[row]] = text
                self.cache_hook.add_partial("generate_until", requests[row].args, text)
            bar.update(len(chunk.rows))

    def _sampler(self, options: dict[str, Any]) -> SamplerConfig:
        """Return the settings of a task's requests; what --model_args set wins over the task."""
        wanted: dict[str, Any] = {}
        if options.get("max_gen_toks") is not None:
            wanted["max_new_tokens"] = int(options["max_gen_toks"])
        if options.get("do_sample") and options.get("temperature") and not has_canvases(self.model):
            wanted["temperature"] = float(options["temperature"])
        return dataclasses.replace(
            self.sampler, **{name: value for name, value in wanted.items() if getattr(self.sampler, name) is None}
        )

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]], greedy: bool) -> list[tuple[float, bool]]:
        def scored(rows: list[int]) -> list[tuple[float, bool]]:
            """Return this rank's (log-likelihood in nats, whether greedy sampling gives it)."""
            own = [pairs[row] for row in rows]
            if has_canvases(self.model):
                read = [ar_log_likelihood(self.model, *pair) for pair in own]
                return [(each.value, each.greedy) for each in read]
            values = log_likelihoods(
                self.model,
                own,
                self.num_samples,
                self.seed,
                batch_size=self.batch_size,
                antithetic=self.antithetic,
                exact_if_cheaper=True,
            )
            exact = greedily_written(self.model, own, self.batch_size) if greedy else [False] * len(own)
            return [(each.value, same) for each, same in zip(values, exact, strict=True)]

        return divide_rows(list(range(len(pairs))), self.ranks, scored, self.together)

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Return the tokens of a context and its continuation, the context cut on the left where both are too long.

        Blanks at the context's end belong to the continuation's first token, as in the harness's own models.
        """
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        whole = self._encode(context + continuation)
        start = len(self._encode(context)) if context else 0
        prompt, answer = whole[:start], whole[start:]
        prompt = as_document(prompt, self.tokenizer)
        if not prompt and has_canvases(self.model):
            prompt = [self._prefix()]
        if len(answer) >= self.max_length:
            raise ConfigError(
                f"a continuation of {len(answer)} tokens does not fit the model's {self.max_length} positions; leave "
                "the task out"
            )
        return tuple(self._cut(prompt, self.max_length - len(answer))), tuple(answer)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _document(self, text: str) -> list[int]:
        return as_document(self._encode(text), self.tokenizer)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """Return a context cut on the left to `room` tokens, at least one; the start of text stays before the rest."""
        kept = len(self._start) if ids[: len(self._start)] == self._start and room > len(self._start) else 0
        return ids if len(ids) <= room else ids[:kept] + ids[kept - room :]

    def _prefix(self) -> int:
        """Return the token that stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.tokenizer.eos_token_id


def _load(name: str, adapter: str | None, dtype: str | None, device: str | None) -> tuple[Any, Any, Ranks]:
    from unmask.distributed.ranks import join
    from unmask.distributed.runtime import own_device, pick_device
    from unmask.models.folders import find_folder
    from unmask.models.loading import load_model
    from unmask.models.tokenizer import load_tokenizer, tokenizer_folder

    folder = str(find_folder(name, "--model_args: pretrained"))
    tokenizer = load_tokenizer(str(tokenizer_folder(folder, adapter)), "--model_args: pretrained")
    # The harness's command line says cuda:0 when nobody said anything.
    where = own_device(pick_device("auto" if device in (None, "cuda:0") else device))
    ranks = join(where)
    return load_model(folder, dtype, where, adapter), tokenizer, ranks


def _second(request: Instance) -> Any:
    """Return a request's second argument, which the harness declares without a type."""
    return tuple(request.args)[1]  # pyright: ignore[reportGeneralTypeIssues]


def _stops(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _parts(total: int, silent: bool, name: str, size: int = _PAIRS_AT_ONCE) -> Any:
    """Yield slices of a list, with a progress bar."""
    with tqdm(total=total, disable=silent, desc=name) as bar:
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))
            bar.update(min(size, total - start))
