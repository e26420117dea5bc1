"""The loop's laws, on networks that follow a script and on random ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError
from unmask.models.llada.family import FAMILY as LLADA
from unmask.sampling.backends.bidirectional import BidirectionalBackend
from unmask.sampling.engine.draws import row_keys
from unmask.sampling.engine.loop import Request, StepEvent, denoise
from unmask.sampling.engine.noise import quota
from unmask.sampling.generate import generate
from unmask.sampling.settings import family_settings, planned_calls

MaskSettings = partial(family_settings, LLADA)


def peak(token: int, height: float = 5.0) -> Tensor:
    return torch.zeros(10).index_fill(0, torch.tensor([token]), height)


def run(backend, rows: int = 1, **fields) -> list[StepEvent]:
    return list(denoise(backend, [Request(i, [i], i) for i in range(rows)], MaskSettings(**fields)))


def order(events: list[StepEvent], row: int = 0) -> list[list[int]]:
    return [event.committed_BC[row].nonzero()[:, 0].tolist() for event in events]


def test_positions_are_committed_by_confidence_inside_the_current_block(script):
    heights = [1.0, 2.0, 3.0, 6.0, 9.0, 7.0]
    events = run(script(lambda row, at, call: peak(at, heights[at])), steps=6, max_new_tokens=6, block_size=3)
    assert order(events) == [[2], [1], [0], [4], [5], [3]]
    assert events[-1].answer_BC.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert [int(event.block_B[0]) for event in events] == [0, 0, 0, 1, 1, 1]
    assert [int(event.step_B[0]) for event in events] == [0, 1, 2, 0, 1, 2]
    assert [int(event.nfe_B[0]) for event in events] == [1, 2, 3, 4, 5, 6]


def test_equal_confidence_commits_from_the_left(script):
    assert order(run(script(lambda *_: peak(1)), steps=4, max_new_tokens=4, block_size=4)) == [[0], [1], [2], [3]]


def test_a_committed_token_never_changes_though_the_network_changes_its_mind(script):
    events = run(script(lambda row, at, call: peak(call % 8)), steps=5, max_new_tokens=5, block_size=5)
    assert events[-1].answer_BC.tolist() == [[0, 1, 2, 3, 4]]
    for before, after in zip(events, events[1:], strict=False):
        committed = ~before.masked_BC
        assert torch.equal(before.answer_BC[committed], after.answer_BC[committed])


def test_a_block_that_is_complete_in_its_first_step_costs_one_call(script):
    backend = script(lambda row, at, call: peak(1, 20.0 if at < 4 else 0.5))
    events = run(backend, max_new_tokens=8, block_size=4, threshold=0.9)
    assert order(events) == [[0, 1, 2, 3], [4], [5], [6], [7]]
    assert backend.calls == 5


def test_rows_advance_at_their_own_pace(script):
    backend = script(lambda row, at, call: peak(1, 20.0 if row == 0 else 0.5))
    events = run(backend, rows=2, max_new_tokens=4, block_size=2, threshold=0.9)
    assert [event.rows for event in events] == [(0, 1), (0, 1), (1,), (1,)]
    assert [event.nfe_B.tolist() for event in events] == [[1, 1], [2, 2], [3], [4]]
    assert events[1].block_B.tolist() == [1, 0]


@pytest.mark.parametrize(("threshold", "calls"), [(0.0, 3), (1.5, 10)], ids=["one call a block", "one token a call"])
def test_extreme_thresholds(script, threshold, calls):
    backend = script(lambda row, at, call: peak(at % 8, at))
    events = run(backend, max_new_tokens=10, block_size=4, threshold=threshold)
    assert backend.calls == calls == len(events)


def test_threshold_above_one_equals_one_token_a_step(reference_model, reference):
    prompts = reference["generate.prompt"].tolist()
    by_quota = SamplerConfig(steps=24, max_new_tokens=24, block_size=8)
    by_threshold = SamplerConfig(max_new_tokens=24, block_size=8, threshold=1.01)
    one, other = (generate(reference_model, prompts, sampler=sampler) for sampler in (by_quota, by_threshold))
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in other]


def test_a_stop_token_ends_the_row_once_everything_left_of_it_is_committed(script):
    # The stop token at 5 comes first, then 0 to 4; 6 to 15 never need to be computed.
    backend = script(lambda row, at, call: peak(8, 9.0) if at == 5 else peak(1, 5.0 - at / 10))
    events = run(backend, steps=16, max_new_tokens=16, block_size=8)
    assert order(events) == [[5], [0], [1], [2], [3], [4]]
    assert [bool(event.finished_B[0]) for event in events] == [False] * 5 + [True]


def test_an_open_position_left_of_a_stop_token_may_become_an_earlier_one(script):
    backend = script(lambda row, at, call: peak(8, 9.0 if at == 3 else 4.0) if at in (1, 3) else peak(2, 3.0))
    last = run(backend, steps=4, max_new_tokens=4, block_size=4)[-1]
    assert last.answer_BC[0, :2].tolist() == [2, 8] and bool(last.finished_B[0])


def test_finished_rows_leave_and_the_others_go_on(script):
    backend = script(lambda row, at, call: peak(8 if row == 1 and call == 0 else 3))
    events = run(backend, rows=3, steps=3, max_new_tokens=3, block_size=3)
    assert [event.rows for event in events] == [(0, 1, 2), (0, 2), (0, 2)]


def test_eos_suppressed_is_never_written_and_deferred_comes_last(script):
    logits = lambda row, at, call: peak(8, 9.0) + peak(at, 4.0) if at < 2 else peak(3, 2.0)  # noqa: E731
    fields = {"steps": 4, "max_new_tokens": 4, "block_size": 4}
    assert 8 not in run(script(logits), eos="suppress", **fields)[-1].answer_BC
    assert run(script(logits), eos="suppress", **fields)[-1].answer_BC.tolist() == [[0, 1, 3, 3]]
    deferred = run(script(logits), eos="defer", **fields)
    assert order(deferred) == [[2], [3], [0]]
    assert deferred[-1].answer_BC[0, 0] == 8
    assert order(run(script(logits), eos="allow", **fields)) == [[0]]


def test_other_stop_tokens_end_a_row_too(script):
    backend = script(lambda row, at, call: peak(4))
    events = list(denoise(backend, [Request(0, [0], 0)], MaskSettings(steps=8, max_new_tokens=8), stop_ids=[4]))
    assert len(events) == 1


def test_the_mask_is_never_written_even_if_it_is_named_as_a_stop_token(script):
    backend = script(lambda row, at, call: peak(9, 9.0) + peak(4))
    events = list(denoise(backend, [Request(0, [0], 0)], MaskSettings(steps=2, max_new_tokens=2), stop_ids=[9]))
    assert events[-1].answer_BC.tolist() == [[4, 4]]


def test_every_call_draws_afresh(script):
    first, second = run(script(lambda *_: peak(1)), steps=2, max_new_tokens=6, remasking="random")
    scored_twice = first.masked_BC
    assert scored_twice.sum() == 3
    assert not (first.score_BC == second.score_BC)[scored_twice].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_stop_with_the_place_named(script, bad):
    backend = script(lambda row, at, call: peak(1, bad if call == 2 and row == 1 and at == 3 else 1.0))
    with pytest.raises(SamplingError, match=r"not finite at prompt 1 \(block 2, step 1\)"):
        run(backend, rows=2, steps=4, max_new_tokens=4, block_size=2)


def test_a_network_with_nan_weights_is_refused(small_model):
    model = small_model(favour={3: float("nan")})
    with pytest.raises(SamplingError, match="prompt 0 .*check the checkpoint"):
        generate(model, [1, 2], sampler=SamplerConfig(steps=2, max_new_tokens=4))


@given(
    steps=st.integers(1, 20),
    length=st.integers(1, 14),
    block=st.integers(1, 16),
    temperature=st.sampled_from([0.0, 1.0]),
    remasking=st.sampled_from(["low_confidence", "random"]),
    threshold=st.sampled_from([None, 0.05, 0.5]),
    favoured=st.sampled_from([37, 39, 43, 38, 5]),
    cache=st.sampled_from(["none", "prefix", "dual"]),
)
@settings(deadline=None, max_examples=40)
def test_every_position_is_filled_with_allowed_tokens_whatever_the_head_favours(
    small_model, steps, length, block, temperature, remasking, threshold, favoured, cache
):
    model = small_model({favoured: 50.0})
    threshold = threshold if remasking == "low_confidence" else None  # the two exclude each other
    sampler = MaskSettings(
        steps=steps, max_new_tokens=length, block_size=block, temperature=temperature, remasking=remasking,
        threshold=threshold, cache=cache,
    )  # fmt: skip
    events = list(
        denoise(BidirectionalBackend(model, sampler), [Request(0, [3, 39, 4], 9), Request(1, [5], 8)], sampler)
    )
    sizes = [min(block, length - start) for start in range(0, length, block)]
    plan = zip(sizes, planned_calls(sizes, steps), strict=True)
    quotas = [quota(size, calls, step) for size, calls in plan for step in range(calls)]
    for row in (0, 1):
        mine = [(event, event.rows.index(row)) for event in events if row in event.rows]
        last, at = mine[-1]
        answer, is_open = last.answer_BC[at], last.masked_BC[at]
        assert not set(answer[~is_open].tolist()) & {37, 39, *range(40, 48)}
        assert bool(last.finished_B[at]) and int(last.nfe_B[at]) == len(mine)
        ended_early = 38 in answer
        assert ended_early or not is_open.any()
        committed = [int(event.committed_BC[place].sum()) for event, place in mine]
        assert min(committed) >= 1
        if threshold is None:
            assert committed == quotas[: len(committed)] and (ended_early or len(committed) == len(quotas))
        if favoured == 38:
            assert 38 in answer


class Watched:
    """The LLaDA backend, keeping the narrowest margin between a position's two best tokens."""

    def __init__(self, model) -> None:
        self.inner = BidirectionalBackend(model, MaskSettings())
        self.spec, self.device = self.inner.spec, self.inner.device
        self.prefill, self.denoise, self.commit = self.inner.prefill, self.inner.denoise, self.inner.commit
        self.self_conditioning = None
        self.margin = float("inf")

    def logits(self, hidden_MD) -> Tensor:
        logits = self.inner.logits(hidden_MD)
        best = logits[:, :510].topk(2, dim=-1).values
        self.margin = min(self.margin, float((best[:, 0] - best[:, 1]).min()))
        return logits


@pytest.mark.parametrize("fields", [{}, {"threshold": 0.2}], ids=["quota", "threshold"])
def test_a_row_alone_equals_the_row_in_any_batch_and_order(reference_model, fields):
    numbers = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 500, (length,), generator=numbers).tolist() for length in (3, 17, 1, 9, 9)]
    requests = [
        Request(i, prompt, key) for i, (prompt, key) in enumerate(zip(prompts, row_keys(0, prompts), strict=True))
    ]
    sampler = MaskSettings(steps=12, max_new_tokens=24, block_size=8, **fields)

    def answers(batch: list[Request], backend) -> dict[int, tuple]:
        found = {}
        for event in denoise(backend, batch, sampler):
            for place in event.finished_B.nonzero()[:, 0].tolist():
                found[event.rows[place]] = (event.answer_BC[place].tolist(), int(event.nfe_B[place]))
        return found

    backend = Watched(reference_model)
    alone = {index: answer for request in requests for index, answer in answers([request], backend).items()}
    assert (
        backend.margin > 1e-5
    )  # decisions are clear enough for fp32, so equality is asked of the sampler, not of luck
    assert len(alone) == 5
    for batch in (requests, requests[::-1], [requests[3], requests[0]], requests[1:]):
        assert answers(batch, BidirectionalBackend(reference_model, MaskSettings())) == {
            request.index: alone[request.index] for request in batch
        }
