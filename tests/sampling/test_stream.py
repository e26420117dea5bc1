from __future__ import annotations

import doctest

import pytest
import torch

import unmask
from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError

SHORT = SamplerConfig(steps=4, max_new_tokens=8, block_size=4, eos="suppress")


@pytest.mark.parametrize("documented", ["generate", "infill", "stream", "SamplerConfig", "StepEvent"])
def test_the_documented_example_runs_and_prints_what_it_says(documented):
    example = doctest.DocTestFinder(recurse=False).find(getattr(unmask, documented), documented, globs={})[0]
    assert len(example.examples) >= 3
    assert doctest.DocTestRunner().run(example).failed == 0


def test_events_are_those_of_generate(small_model):
    model, seen = small_model(), []
    answer = unmask.generate(model, [[1, 2], [3]], sampler=SHORT, on_event=seen.append)
    events = list(unmask.stream(model, [[1, 2], [3]], sampler=SHORT))
    assert len(events) == len(seen) == 4
    for one, other in zip(events, seen, strict=True):
        assert one.rows == other.rows and torch.equal(one.answer_BC, other.answer_BC)
        assert one.lengths == (8, 8)
    last = events[-1]
    assert last.answer_BC[last.rows.index(0)].tolist() == answer[0].token_ids


def test_an_event_says_how_sure_the_call_was_whatever_the_score(small_model):
    for remasking in ("low_confidence", "entropy", "margin", "random", "left_to_right"):
        sampler = SamplerConfig(steps=4, max_new_tokens=8, block_size=4, eos="suppress", remasking=remasking)
        for event in unmask.stream(small_model(), [1], sampler=sampler):
            weighed = event.score_BC.isfinite()
            assert torch.equal(weighed, event.confidence_BC > 0) and event.confidence_BC.max() <= 1
            if remasking == "low_confidence":
                assert torch.equal(event.score_BC[weighed], event.confidence_BC[weighed])


def test_mistakes_are_refused_before_the_first_event(small_model):
    with pytest.raises(SamplingError, match="batch_size"):
        unmask.stream(small_model(), [1], batch_size=0)


def test_eval_mode_ends_when_the_iterator_is_closed(small_model):
    model = small_model().train()
    events = unmask.stream(model, [1], sampler=SHORT)
    next(events)
    assert not model.training
    events.close()
    assert model.training


def test_answers_are_handed_over_as_soon_as_they_are_finished(small_model):
    calls, answers = [], {}
    found = unmask.generate(
        small_model(),
        [[1] * 9, [2], [3] * 5],
        sampler=SHORT,
        batch_size=1,
        on_event=lambda event: calls.append(event.rows),
        on_answer=lambda index, answer: answers.update({index: (len(calls), answer)}),
    )
    assert {index: count for index, (count, _) in answers.items()} == {1: 4, 2: 8, 0: 12}
    assert [answers[index][1] for index in range(3)] == found
    assert all(0 < answer.stats.seconds for answer in found)
