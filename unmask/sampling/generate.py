"""From prompts to answers: encode, sample in batches, decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError
from unmask.sampling.engine.draws import row_keys
from unmask.sampling.engine.loop import Request, StepEvent, denoise
from unmask.sampling.jobs import LoadedModel, as_loaded
from unmask.sampling.prompts import as_list, check_prompts, encode_prompts, labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows denoised together unless the caller says otherwise.
DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class Stats:
    """What an answer cost."""

    nfe: int  # network calls that the row took part in; a guidance pair counts once
    tokens_per_forward: float  # tokens of the answer (a stop token not counted) per network call
    seconds: float  # from when the row joined the batch until it was finished
    tokens_per_second: float  # tokens of the answer per second, for this row alone


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        token_ids: the answer up to and without the first stop token, at most `max_new_tokens`.
        text: `token_ids` decoded without special tokens, the tokens that the chat template writes around turns, what it
            writes around an answer, and reasoning; None without a tokenizer.
        finish_reason: "eos" when a stop token ended it, otherwise "length".
        prompt_ids: the tokens that it answers.
        stats: what it cost.
        reasoning: what it says between the tokenizer's reasoning tags, "" for nothing between them; None without tags.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: str
    prompt_ids: list[int]
    stats: Stats
    reasoning: str | None = None


def generate(
    model: nn.Module,
    prompts: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sampler: SamplerConfig | None = None,
    seed: int = 42,
    raw: bool = False,
    batch_size: int | None = None,
    on_event: Callable[[StepEvent], None] | None = None,
    on_answer: Callable[[int, Generation], None] | None = None,
    labels: Sequence[str] | None = None,
) -> list[Generation]:
    """Sample an answer to each prompt.

    An answer does not depend on the other prompts, their order or the batch size, but that a prompt given twice draws
    other numbers the second time, and that matrix products round differently with the batch's shape (where two choices
    tie in the model's precision, the tie may then fall the other way).

    Args:
        model: from `unmask.load_model`; put into eval mode for the time of the call.
        prompts: a prompt or a list of prompts. A prompt is a text (one user turn through the chat template, or literal
            text with `raw`), a chat as a list of turns in any form that training reads, a list of token ids, or a row
            of a file of prompts.
        tokenizer: needed for texts and chats, and for `text` in the result.
        sampler: settings over the checkpoint's (generation_config.json) and its family's; None = those.
        seed: with equal seed and prompt the answer is the same.
        batch_size: rows denoised together, at least 1; None = 16. A finished row's place goes to the next prompt.
        on_event: called after each network call.
        on_answer: called with a prompt's number and its answer as soon as that is finished.
        labels: what messages call each prompt; None = `prompt NUMBER`, from 0.

    Returns:
        a `Generation` for each prompt, in their order; a list of one for a single prompt.

    Raises:
        SamplingError: a prompt that is empty, too long for the model or needs a tokenizer; a setting that the model's
            family does not have; a model of no known family; logits that are not finite.

    Example:
        >>> import torch, unmask
        >>> from unmask.models.llada.config import LLaDAConfig
        >>> from unmask.models.llada.model import LLaDA, initialise
        >>> model = LLaDA(LLaDAConfig(
        ...     d_model=16, n_heads=2, n_layers=1, mlp_hidden_size=16, vocab_size=32, embedding_size=32,
        ...     mask_token_id=31, eos_token_id=30, pad_token_id=30,
        ... ))
        >>> initialise(model, torch.Generator().manual_seed(0))
        >>> sampler = unmask.SamplerConfig(steps=4, max_new_tokens=8, eos="suppress")
        >>> for answer in unmask.generate(model, [[1, 2, 3], [4]], sampler=sampler):
        ...     print(len(answer.token_ids), answer.finish_reason, answer.stats.nfe)
        8 length 4
        8 length 4
    """
    loaded = as_loaded(model, tokenizer, sampler)
    encoded, called = encode_for(loaded, prompts, raw, labels)
    return answer(loaded, encoded, called, seed, batch_size, on_event, on_answer)


def answer(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    labels: Sequence[str],
    seed: int = 42,
    batch_size: int | None = None,
    on_event: Callable[[StepEvent], None] | None = None,
    on_answer: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Sample an answer to each prompt, given as tokens that fit the model; arguments and errors as in `generate`."""
    results: dict[int, Generation] = {}
    for event, row, seconds in rows_of(loaded, _requests(prompts, seed), labels, batch_size, on_event):
        if event.finished_B[row]:
            index = event.rows[row]
            results[index] = _result(loaded, prompts[index], event, row, seconds)
            if on_answer is not None:
                on_answer(index, results[index])
    return [results[index] for index in range(len(prompts))]


def stream(
    model: nn.Module,
    prompts: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sampler: SamplerConfig | None = None,
    seed: int = 42,
    raw: bool = False,
    batch_size: int | None = None,
) -> Generator[StepEvent]:
    """Sample an answer to each prompt and yield what each network call committed, as `generate` gives to `on_event`.

    Arguments and errors as in `generate`; what is wrong with the arguments is said at once, before the first event.
    The model is in eval mode until the iterator is used up or closed.

    Example:
        >>> import torch, unmask
        >>> from unmask.models.llada.config import LLaDAConfig
        >>> from unmask.models.llada.model import LLaDA, initialise
        >>> model = LLaDA(LLaDAConfig(
        ...     d_model=16, n_heads=2, n_layers=1, mlp_hidden_size=16, vocab_size=32, embedding_size=32,
        ...     mask_token_id=31, eos_token_id=30, pad_token_id=30,
        ... ))
        >>> initialise(model, torch.Generator().manual_seed(0))
        >>> sampler = unmask.SamplerConfig(steps=4, max_new_tokens=8, block_size=4, eos="suppress")
        >>> for event in unmask.stream(model, [1, 2, 3], sampler=sampler):
        ...     print(int(event.nfe_B[0]), "calls,", int(event.masked_BC[0].sum()), "masked")
        1 calls, 6 masked
        2 calls, 4 masked
        3 calls, 2 masked
        4 calls, 0 masked
    """
    loaded = as_loaded(model, tokenizer, sampler)
    encoded, labels = encode_for(loaded, prompts, raw)
    return _events(loaded, _requests(encoded, seed), labels, checked_batch_size(batch_size))


def encode_for(
    loaded: LoadedModel, prompts: Any, raw: bool = False, labels: Sequence[str] | None = None
) -> tuple[list[list[int]], Sequence[str]]:
    """Return prompts as tokens that fit the model, and their labels; arguments and errors as in `generate`."""
    items = as_list(prompts)
    called = labels_of(len(items), "prompt", labels)
    encoded = encode_prompts(items, loaded.tokenizer, raw, loaded.mask_id, called)
    check_prompts(encoded, called, loaded.config, loaded.settings)
    return encoded, called


def _requests(prompts: Sequence[list[int]], seed: int) -> list[Request]:
    keys = row_keys(seed, prompts)
    requests = [Request(index, ids, key) for index, (ids, key) in enumerate(zip(prompts, keys, strict=True))]
    return sorted(requests, key=lambda request: len(request.prompt_ids))  # prompts of like length need little padding


def rows_of(
    loaded: LoadedModel,
    requests: Sequence[Request],
    labels: Sequence[str],
    batch_size: int | None,
    on_event: Callable[[StepEvent], None] | None = None,
    blanks: bool = False,
) -> Iterator[tuple[StepEvent, int, float]]:
    """Yield each row of each call: the event, the row in it, and its seconds since before its first call.

    Into `blanks` tokens that end an answer are never written, and their confidences are at temperature 1.
    """
    now, joined = time.perf_counter(), dict[int, float]()
    for event in _events(loaded, requests, labels, checked_batch_size(batch_size), blanks):
        for index in event.rows:
            joined.setdefault(index, now)
        now = time.perf_counter()
        if on_event is not None:
            on_event(event)
        for row, index in enumerate(event.rows):
            yield event, row, now - joined[index]


def _events(
    loaded: LoadedModel, requests: Sequence[Request], labels: Sequence[str], size: int, blanks: bool = False
) -> Generator[StepEvent]:
    """Run the loop, every module in eval mode meanwhile."""
    training = [module for module in loaded.model.modules() if module.training]
    loaded.model.eval()
    banned = loaded.stop_ids if blanks else ()
    try:
        yield from denoise(
            loaded.backend, requests, loaded.settings, loaded.stop_ids, None, size, banned, blanks, labels
        )
    finally:
        for module in training:
            module.training = True


def checked_batch_size(batch_size: int | None) -> int:
    """Return how many rows are denoised together; None = the default.

    Raises:
        SamplingError: no integer of at least 1.
    """
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SamplingError(f"batch_size: must be an integer of at least 1, got {batch_size!r}")
    return size


def _result(loaded: LoadedModel, prompt_ids: list[int], event: StepEvent, row: int, seconds: float) -> Generation:
    written, nfe = event.answer_BC[row, : event.lengths[row]].tolist(), int(event.nfe_B[row])
    end = next((place for place, token in enumerate(written) if token in loaded.stop_ids), None)
    token_ids = written[:end]
    text, reasoning = None, None
    if loaded.tokenizer is not None:
        text, reasoning = loaded.read(prompt_ids, token_ids, ended=end is not None)
    stats = Stats(nfe, len(token_ids) / nfe, seconds, len(token_ids) / max(seconds, 1e-9))
    return Generation(token_ids, text, "length" if end is None else "eos", prompt_ids, stats, reasoning)
