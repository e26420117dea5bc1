"""Calls that are recorded and replayed, with a recorder that runs the function again instead of a CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.config.sampler import SamplerConfig
from unmask.models.diffusion_gemma.model import DiffusionGemma
from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA, initialise
from unmask.sampling.backends import replay
from unmask.sampling.backends.replay import Function, Recording, Replays, replays_for
from unmask.sampling.generate import generate


class Recorder:
    """Runs the function again on inputs of its own: what a caller forgot to name as input is then out of date.

    Addresses, memory and streams are for `tests/gpu`.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.made: list[weakref.ref[Recording]] = []

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        self.recorded += 1
        kept = tuple(tensor.clone() for tensor in inputs)
        output = torch.empty_like(function(*kept))

        def run() -> None:
            self.replayed += 1
            output.copy_(function(*kept))

        recording = Recording(function, kept, output, run)
        self.made.append(weakref.ref(recording))
        return recording


def double(tensor: Tensor) -> Tensor:
    return 2 * tensor


def test_calls_of_a_kind_are_recorded_after_one_and_then_replayed() -> None:
    recorder = Recorder()
    call = Replays(recorder)
    for number in range(6):
        found = call(None, "kind", double, torch.full((4,), float(number)))
        assert found.tolist() == [2.0 * number] * 4
    assert (recorder.recorded, recorder.replayed) == (1, 5)
    call(None, "other", double, torch.ones(4))
    call(None, "kind", double, torch.ones(5))  # another shape is another kind
    assert (recorder.recorded, recorder.replayed) == (1, 5)


def test_recordings_last_as_long_as_their_scope() -> None:
    recorder = Recorder()
    call = Replays(recorder)
    for scope in (object(), object()):
        for number in range(4):
            assert call(scope, "kind", double, torch.full((4,), float(number))).tolist() == [2.0 * number] * 4
    assert (recorder.recorded, recorder.replayed) == (2, 6)
    assert [made() is None for made in recorder.made] == [True, False]


def test_large_calls_and_more_kinds_than_are_kept_are_not_recorded() -> None:
    recorder = Recorder()
    call = Replays(recorder)
    for _ in range(5):
        call(None, "large", double, torch.ones(5000))
    assert recorder.recorded == 0
    for _ in range(5):
        for kind in range(replay._KEPT + 1):
            assert call(None, kind, double, torch.ones(2)).tolist() == [2.0, 2.0]
    assert recorder.recorded == replay._KEPT


def test_a_kind_takes_the_place_of_one_that_is_no_longer_called() -> None:
    recorder = Recorder()
    call = Replays(recorder)
    for kind in range(3 * replay._KEPT):
        for number in range(8):
            assert call(None, kind, double, torch.full((2,), float(number))).tolist() == [2.0 * number] * 2
    assert recorder.recorded == 3 * replay._KEPT
    assert sum(made() is not None for made in recorder.made) <= replay._KEPT


def test_nothing_is_recorded_under_autocast() -> None:
    recorder = Recorder()
    call = Replays(recorder)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            call(None, "kind", double, torch.ones(1))
    assert recorder.recorded == 0


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_recorded_is_called_and_said_once() -> None:
    def refuse(function: Function, inputs: Sequence[Tensor]) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    call = Replays(refuse)
    call(None, "kind", double, torch.ones(1))
    with pytest.warns(RuntimeWarning, match=r"kernel by kernel: operation not permitted .* \(UNMASK_REPLAY=0 has"):
        assert call(None, "kind", double, torch.ones(1)).tolist() == [2.0]
    assert call(None, "kind", double, torch.ones(1)).tolist() == [2.0]


def test_nothing_is_recorded_on_a_cpu() -> None:
    call = replays_for(torch.nn.Linear(2, 2))
    assert [call(None, "kind", double, torch.ones(1)).item() for _ in range(4)] == [2.0] * 4


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_llada_answers_are_the_same_by_replays(cache: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that changes from call to call is among the inputs: windows move, rows leave and join."""
    config = LLaDAConfig(
        d_model=32, n_heads=2, n_layers=2, mlp_hidden_size=48, vocab_size=64, embedding_size=64, mask_token_id=63,
        eos_token_id=62, pad_token_id=62, max_sequence_length=64,
    )  # fmt: skip
    model = LLaDA(config)
    initialise(model, torch.Generator().manual_seed(0))
    sampler = SamplerConfig(steps=24, max_new_tokens=24, block_size=8, cache=cache, temperature=0.5)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12]]
    expected = generate(model, prompts, sampler=sampler, batch_size=batch_size)
    recorder = Recorder()
    monkeypatch.setattr("unmask.sampling.backends.bidirectional.replays_for", lambda _: Replays(recorder))
    found = generate(model, prompts, sampler=sampler, batch_size=batch_size)
    assert recorder.replayed > 8
    assert recorder.recorded <= 4
    assert not any(made() for made in recorder.made)  # none outlives the call, without the collector's help
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("cache", ["block", "none"])
def test_canvases_are_the_same_by_replays(
    cache: Any, batch_size: int, gemma_model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows too, which join and leave: as many kinds of calls as there are numbers of rows, and no more."""
    sampler = SamplerConfig(steps=6, max_new_tokens=40, eos="suppress", confidence_threshold=0.0, cache=cache)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [9], [11, 12], [13, 14, 15, 16]]
    expected = generate(gemma_model, prompts, sampler=sampler, batch_size=batch_size)
    recorder = Recorder()
    monkeypatch.setattr("unmask.sampling.backends.canvas.replays_for", lambda _: Replays(recorder))
    found = generate(gemma_model, prompts, sampler=sampler, batch_size=batch_size)
    calls = sum(answer.stats.nfe for answer in found) // batch_size
    assert recorder.recorded <= batch_size and recorder.replayed > calls - 3 * batch_size
    assert not any(made() for made in recorder.made)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


def test_canvases_are_recorded_anew_only_where_they_pass_a_multiple(
    gemma_model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.sampling.backends.canvas._COLUMNS", 32)
    sampler = SamplerConfig(steps=6, max_new_tokens=96, eos="suppress", confidence_threshold=0.0)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
    expected = generate(gemma_model, prompts, sampler=sampler)
    recorder = Recorder()
    monkeypatch.setattr("unmask.sampling.backends.canvas.replays_for", lambda _: Replays(recorder))
    found = generate(gemma_model, prompts, sampler=sampler)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert recorder.recorded == 3  # of six canvases, at lengths 3 to 23, 35 to 55 and 67 to 87
