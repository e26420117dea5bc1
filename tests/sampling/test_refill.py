"""Rows that join while others are under way, rows of unlike length, and templates."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from unmask.errors import SamplingError
from unmask.models.diffusion_gemma.family import FAMILY as DIFFUSION_GEMMA
from unmask.models.llada.family import FAMILY as LLADA
from unmask.sampling.backends.backend import backend_for
from unmask.sampling.backends.bidirectional import BidirectionalBackend
from unmask.sampling.engine.draws import row_keys
from unmask.sampling.engine.loop import Request, denoise
from unmask.sampling.engine.state import Template
from unmask.sampling.settings import family_settings

MaskSettings = partial(family_settings, LLADA)
CanvasSettings = partial(family_settings, DIFFUSION_GEMMA, block_size=256)


def peak(token: int, height: float = 5.0) -> torch.Tensor:
    return torch.zeros(10).index_fill(0, torch.tensor([token]), height)


def answers(backend, requests, settings, batch_size) -> dict[int, tuple[list[int], int]]:
    found = {}
    for event in denoise(backend, iter(requests), settings, batch_size=batch_size):
        assert len(event.rows) <= batch_size
        for place in event.finished_B.nonzero()[:, 0].tolist():
            is_open = event.masked_BC[place, : event.lengths[place]].tolist()
            committed = is_open.index(True) if True in is_open else len(is_open)
            found[event.rows[place]] = (event.answer_BC[place, :committed].tolist(), int(event.nfe_B[place]))
    return found


def test_a_finished_rows_place_is_taken_before_the_next_call(script):
    # Row 0 is sure at once, the others take a call a token.
    backend = script(lambda row, at, call: peak(1, 20.0 if row == 0 else 0.5))
    requests = [Request(i, [i], i) for i in range(4)]
    events = list(denoise(backend, requests, MaskSettings(max_new_tokens=2, threshold=0.9), batch_size=2))
    assert [event.rows for event in events] == [(0, 1), (1, 2), (2, 3), (3,)]
    assert [event.step_B.tolist() for event in events] == [[0, 0], [1, 0], [1, 0], [1]]
    assert backend.calls == 4


def test_requests_are_taken_as_places_become_free(script):
    taken = []

    def queue():
        for i in range(3):
            taken.append(i)
            yield Request(i, [i], i)

    loop = denoise(script(lambda *_: peak(1)), queue(), MaskSettings(steps=1, max_new_tokens=2), batch_size=1)
    for number in range(3):
        next(loop)
        assert taken == list(range(number + 1))
    assert list(loop) == []


def test_no_requests_no_calls(script):
    backend = script(lambda *_: peak(1))
    assert list(denoise(backend, [], MaskSettings())) == [] and backend.calls == 0


def prompts_of(*lengths: int, high: int) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(5)
    return [torch.randint(8, high, (length,), generator=numbers).tolist() for length in lengths]


def requests_of(prompts: list[list[int]], block: int) -> list[Request]:
    """Some free, some with given parts of unlike lengths."""
    keys = row_keys(0, prompts)
    given = [None, *(([20 + i] * (block * 2), i) for i in range(1, len(prompts)))]
    made = []
    for i, (prompt, key, parts) in enumerate(zip(prompts, keys, given, strict=True)):
        template = None
        if parts is not None and i % 2:
            ids, shift = parts[0][: block * (1 + i % 3)], parts[1]
            is_open = [(place + shift) % 3 > 0 for place in range(len(ids))]
            template = Template(ids, is_open, [place // block for place in range(len(ids))])
        made.append(Request(i, prompt, key, template))
    return made


@pytest.mark.parametrize("fields", [{}, {"threshold": 0.2}, {"factor": 1.0, "revise": "remask"}], ids=str)
def test_a_masked_row_alone_is_the_row_in_any_refilled_batch(reference_model, fields):
    requests = requests_of(prompts_of(3, 17, 1, 9, high=500), 8)
    settings = MaskSettings(steps=12, max_new_tokens=24, block_size=8, **fields)
    backend = BidirectionalBackend(reference_model, settings)
    alone = {i: answer for request in requests for i, answer in answers(backend, [request], settings, 1).items()}
    assert len(alone) == 4 and len({calls for _, calls in alone.values()}) > 1
    assert answers(backend, requests, settings, 3) == alone
    assert answers(backend, requests[::-1], settings, 2) == alone


@pytest.mark.parametrize("cache", ["block", "none"])
def test_a_canvas_alone_is_the_canvas_in_any_refilled_batch_cached_or_not(gemma_model, cache):
    requests = requests_of(prompts_of(3, 30, 1, 12, high=300), 16)
    sure = {"steps": 7, "entropy_bound": 30.0, "confidence_threshold": 0.5, "t_min": 0.02, "t_max": 0.2}
    settings = CanvasSettings(max_new_tokens=24, block_size=16, cache=cache, **sure)
    backend, cached = backend_for(gemma_model, settings), backend_for(gemma_model)
    alone = {i: answer for request in requests for i, answer in answers(cached, [request], settings, 1).items()}
    assert len({calls for _, calls in alone.values()}) > 1
    assert answers(backend, requests[::-1] if cache == "none" else requests, settings, 2) == alone


def test_without_a_cache_canvases_are_encoded_anew(gemma_model, monkeypatch):
    encoded, encode = [], gemma_model.encode
    monkeypatch.setattr(gemma_model, "encode", lambda ids, **o: encoded.append(tuple(ids.shape)) or encode(ids, **o))
    for cache, shapes in (("block", [(1, 5), (1, 16), (1, 16)]), ("none", [(1, 5), (1, 21), (1, 37)])):
        settings = CanvasSettings(steps=2, max_new_tokens=48, block_size=16, cache=cache, eos="suppress")
        list(denoise(backend_for(gemma_model, settings), [Request(0, [9] * 5, 0)], settings))
        assert encoded == shapes
        encoded.clear()


def test_blocks_of_a_template_have_their_own_quotas(script):
    # Blocks of 2, 0 and 5 masked positions share seven steps: four and three, and no call commits nothing.
    is_open = [True, True, False] + [False] * 3 + [True] * 5
    template = Template([4] * 11, is_open, [0] * 3 + [1] * 3 + [2] * 5)
    backend = script(lambda row, at, call: peak(1, 9.0 - at / 2))
    events = list(denoise(backend, [Request(0, [0], 0, template)], MaskSettings(steps=7)))
    assert [int(event.committed_BC.sum()) for event in events] == [1, 1, 2, 2, 1]
    assert [int(event.block_B[0]) for event in events] == [0, 0, 2, 2, 2]
    assert [int(event.end_B[0]) for event in events] == [3, 3, 11, 11, 11]
    assert events[-1].answer_BC.tolist() == [[1, 1, 4, 4, 4, 4, 1, 1, 1, 1, 1]]


def test_a_given_stop_token_ends_nothing_and_a_written_one_does(script):
    template = Template([8, 0, 8, 0], [False, True, False, True], [0, 0, 0, 0])
    end = lambda *_: peak(8)  # noqa: E731
    for logits, opened in ((lambda *_: peak(1), [0, 0]), (end, [0, 1])):
        events = list(denoise(script(logits), [Request(0, [0], 0, template)], MaskSettings(steps=2)))
        assert events[-1].masked_BC[0, [1, 3]].tolist() == [bool(flag) for flag in opened]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (([1, 2], [True], [0, 0]), "one entry a position"),
        (([1, 2], [False, False], [0, 0]), "no position is masked"),
        (([1, 2], [True, True], [1, 1]), "start at 0"),
        (([1, 2], [True, True], [0, 2]), "rise in steps of one"),
        (([1, 2], [True, True], [1, 0]), "start at 0"),
    ],
)
def test_a_template_that_makes_no_sense_is_refused(fields, says):
    with pytest.raises(SamplingError, match=says):
        Template(*fields)


def test_a_committed_stop_token_cuts_the_blocks_behind_it_where_the_cache_is_approximate(script):
    # The stop token at 2 comes first; positions 0 and 1 then still take two calls.
    def answers(row: int, at: int, call: int) -> torch.Tensor:
        return peak(8, 9.0) if at == 2 else peak(1, 5.0)

    for cache, revise, lengths in (
        ("none", "none", [8, 8, 8]),
        ("dual", "none", [8, 4, 4]),
        ("dual", "edit", [8, 8, 8]),
    ):
        backend, seen = script(answers), []
        inner = backend.denoise
        backend.denoise = lambda context, call, seen=seen, inner=inner: (
            seen.append(call.lengths[0]) or inner(context, call)
        )
        settings = MaskSettings(steps=8, max_new_tokens=8, block_size=4, cache=cache, revise=revise)
        assert len(list(denoise(backend, [Request(0, [0], 0)], settings))) == 3
        assert seen == lengths


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cut_rows_alone_are_the_rows_in_any_refilled_batch(small_model, cache):
    # The end of text is likely, so rows end in all blocks, and what is behind is cut while others go on.
    model = small_model(favour={38: 1.5}, n_layers=2)
    settings = MaskSettings(steps=24, max_new_tokens=24, block_size=8, cache=cache)
    backend, seen = BidirectionalBackend(model, settings), set()
    inner = backend.denoise
    backend.denoise = lambda context, call: seen.update(call.lengths) or inner(context, call)
    prompts = prompts_of(3, 17, 1, 9, 2, 30, high=36)
    requests = [
        Request(i, prompt, key) for i, (prompt, key) in enumerate(zip(prompts, row_keys(0, prompts), strict=True))
    ]
    alone = {i: answer for request in requests for i, answer in answers(backend, [request], settings, 1).items()}
    assert seen & {8, 16} and len({calls for _, calls in alone.values()}) > 1
    for size in (2, 6):
        assert answers(backend, requests, settings, size) == alone


def test_a_row_with_a_target_leaves_at_the_first_token_that_is_another_and_no_stop_token_ends_it(script):
    # The positions' order is 2, 3, 1, 0; there is a stop token at 1.
    backend = script(lambda row, at, call: peak(8 if at == 1 else at, 9.0 - abs(at - 2.1)))
    everything = Template([0] * 4, [True] * 4, [0] * 4)
    for target, calls, answer in (([0, 8, 2, 3], 4, [0, 8, 2, 3]), ([0, 1, 2, 3], 3, [9, 8, 2, 3])):
        events = list(denoise(backend, [Request(0, [0], 0, everything, target)], MaskSettings(steps=4)))
        assert len(events) == calls and events[-1].finished_B.tolist() == [True]
        assert events[-1].answer_BC.tolist() == [answer]
    with pytest.raises(SamplingError, match="target_ids must have one token a position"):
        next(denoise(backend, [Request(0, [0], 0, everything, [1])], MaskSettings(steps=4)))
