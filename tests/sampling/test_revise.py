"""Taking tokens back and writing over them: what it may touch, and that it ends."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.models.llada.family import FAMILY as LLADA
from unmask.sampling.engine.loop import Request, StepEvent, denoise
from unmask.sampling.engine.rules import REVISERS, RULES, SCORES
from unmask.sampling.engine.state import Template
from unmask.sampling.infill import _log_probabilities
from unmask.sampling.settings import family_settings

MaskSettings = partial(family_settings, LLADA)

MASK, EOS = 9, 8


def logits_of(**probabilities: float) -> Tensor:
    """Logits with the given probabilities, `t3=0.6`, and the rest shared out."""
    given = {int(name[1:]): share for name, share in probabilities.items()}
    rest = (1 - sum(given.values())) / (10 - len(given))
    return torch.tensor([given.get(token, rest) for token in range(10)]).log()


def run(backend, template: Template | None = None, **fields) -> list[StepEvent]:
    return list(denoise(backend, [Request(0, [0], 0, template)], MaskSettings(**fields)))


def marks(tensor: Tensor) -> list[int]:
    return tensor[0].nonzero()[:, 0].tolist()


def test_a_token_that_has_become_improbable_is_masked_again(script):
    def answers(row: int, at: int, call: int) -> Tensor:
        if at == 0:
            return logits_of(t1=0.95) if call == 0 else logits_of(t2=0.9, t1=0.05)
        return logits_of(t3=0.9 if call >= 1 or at == 1 else 0.1)

    events = run(script(answers), steps=2, max_new_tokens=4, block_size=4, revise="remask", revise_threshold=0.3)
    assert marks(events[0].committed_BC) == [0, 1] and not events[0].revised_BC.any()
    assert marks(events[1].committed_BC) == [2, 3] and marks(events[1].revised_BC) == [0]
    assert events[1].answer_BC[0, 0] == MASK and events[1].masked_BC[0, 0] and not events[1].finished_B[0]
    assert marks(events[2].committed_BC) == [0] and events[2].answer_BC.tolist() == [[2, 3, 3, 3]]
    assert len(events) == 3


def test_fewer_are_masked_again_than_are_committed_the_least_probable_first(script):
    def answers(row: int, at: int, call: int) -> Tensor:
        if call == 0:
            return logits_of(t1=0.95 - at / 100)
        return logits_of(t1=(0.03, 0.01, 0.02, 0.9, 0.9, 0.9)[at])

    events = run(script(answers), steps=2, max_new_tokens=6, block_size=6, revise="remask", revise_threshold=0.5)
    assert marks(events[0].committed_BC) == [0, 1, 2]
    assert marks(events[1].revised_BC) == [1, 2]


def test_one_token_a_call_takes_nothing_back(script):
    backend = script(lambda row, at, call: logits_of(**{f"t{call % 8}": 0.9}))
    events = run(backend, steps=8, max_new_tokens=8, block_size=8, revise="remask", revise_threshold=1.0)
    assert len(events) == 8 and not any(event.revised_BC.any() for event in events)


def test_a_token_is_replaced_by_one_that_has_become_probable_and_the_call_count_stays(script):
    def answers(row: int, at: int, call: int) -> Tensor:
        if at == 0:
            return (logits_of(t1=0.9), logits_of(t2=0.7), logits_of(t2=0.85))[call]
        return logits_of(t3=0.8 - at / 10)

    events = run(script(answers), steps=3, max_new_tokens=3, block_size=3, revise="edit", revise_threshold=0.8)
    assert [marks(event.revised_BC) for event in events] == [[], [], [0]]
    assert events[2].answer_BC.tolist() == [[2, 3, 3]] and len(events) == 3
    # Probabilities without the mask's share; that of the revised position is the new token's.
    shares = [share / (1 - (1 - share) / 9) for share in (0.85, 0.7, 0.6)]
    assert events[2].confidence_BC[0].tolist() == pytest.approx([shares[0], 0, shares[2]])
    logs_C = None
    for event in events:
        logs_C = _log_probabilities(event, 0, logs_C)
    assert logs_C is not None and logs_C.exp().tolist() == pytest.approx(shares)
    assert not any(event.masked_BC[0, 0] for event in events)


def test_given_tokens_and_other_blocks_are_never_revised(script):
    template = Template([5, 0, 0, 9, 0, 0], [False, True, True, False, True, True], [0, 0, 0, 0, 1, 1])
    for revise in ("remask", "edit"):
        backend = script(lambda row, at, call: logits_of(**{f"t{(at + call) % 8}": 0.9}))
        events = run(backend, template, steps=2, revise=revise, revise_threshold=0.5)
        for event in events:
            assert event.answer_BC[0, [0, 3]].tolist() == [5, 9] and not event.masked_BC[0, [0, 3]].any()
            inside = torch.tensor([[0, 0, 0, 0, 1, 1]]) == event.block_B[:, None]
            assert not (event.revised_BC & ~inside).any()


def test_an_edit_writes_no_stop_token_that_is_deferred(script):
    def answers(row: int, at: int, call: int) -> Tensor:
        return logits_of(t8=0.95) if call else logits_of(t1=0.9)

    events = run(script(answers), steps=2, max_new_tokens=4, block_size=4, revise="edit", eos="defer")
    assert not any(event.revised_BC.any() for event in events)


def test_only_ways_that_read_committed_tokens_send_them_through_the_head(script, monkeypatch):
    for revise, widths in (("none", [4, 3, 2, 1]), ("edit", [4, 4, 4, 4])):
        backend, seen = script(lambda *_: logits_of(t1=0.9)), []
        monkeypatch.setattr(backend, "logits", lambda hidden, seen=seen: seen.append(len(hidden)) or hidden.clone())
        run(backend, steps=4, max_new_tokens=4, block_size=4, revise=revise)
        assert seen == widths


RULE_FIELDS = {
    "quota": [{}],
    "threshold": [{"threshold": 0.0}, {"threshold": 0.4}, {"threshold": 1.5}],
    "factor": [{"factor": 0.0}, {"factor": 1.0}, {"factor": 5.0}],
    "entropy_bound": [{"entropy_bound": 0.0}, {"entropy_bound": 1.5}],
}
FITTING = {"quota": list(SCORES), "threshold": ["low_confidence", "margin"], "factor": ["low_confidence", "margin"],
           "entropy_bound": ["entropy"]}  # fmt: skip
COMBINATIONS = [
    {"remasking": score, **fields, "revise": revise}
    for rule, choices in RULE_FIELDS.items()
    for fields in choices
    for score in FITTING[rule]
    for revise in REVISERS
    if revise != "redraw"
]


def test_the_combinations_cover_every_rule_score_and_way_to_revise():
    assert RULE_FIELDS.keys() == RULES.keys()
    assert {score for scores in FITTING.values() for score in scores} == set(SCORES)
    assert {fields["revise"] for fields in COMBINATIONS} == set(REVISERS) - {"redraw"}


@given(
    fields=st.sampled_from(COMBINATIONS),
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=9).filter(any), min_size=1, max_size=3),
    steps=st.integers(1, 12),
    block=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 1.0]),
    eos=st.sampled_from(["allow", "suppress", "defer"]),
    level=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_whatever_is_combined_given_tokens_stay_and_every_row_ends_with_allowed_tokens(
    script, fields, masks, steps, block, temperature, eos, level, seed
):
    numbers = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 10, 10, 10, generator=numbers) * 4  # (row, position, call, token)
    backend = script(lambda row, at, call: logits[row, at, call % 10])
    templates = [
        Template([(MASK, EOS, 3)[at % 3] for at in range(len(row))], row, [at // block for at in range(len(row))])
        for row in masks
    ]
    requests = [Request(number, [number], number, template) for number, template in enumerate(templates)]
    sampler = MaskSettings(steps=steps, temperature=temperature, eos=eos, revise_threshold=level, **fields)
    finished = set()
    for event in denoise(backend, requests, sampler, batch_size=2):
        for place, number in enumerate(event.rows):
            template, length = templates[number], event.lengths[place]
            assert length == len(template.masked)
            answer, is_open = event.answer_BC[place, :length].tolist(), event.masked_BC[place, :length].tolist()
            written = [at for at in range(length) if template.masked[at] and not is_open[at]]
            assert all(answer[at] == template.answer_ids[at] for at in range(length) if not template.masked[at])
            assert not any(is_open[at] for at in range(length) if not template.masked[at])
            assert all(answer[at] != MASK and (eos != "suppress" or answer[at] != EOS) for at in written)
            assert int(event.committed_BC[place].sum()) > int((event.revised_BC & event.masked_BC)[place].sum())
            assert not event.masked_BC[place, length:].any()
            # The bound: never more calls than one for each masked position.
            assert int(event.nfe_B[place]) <= sum(template.masked)
            if event.finished_B[place]:
                finished.add(number)
                stops = [at for at in written if answer[at] == EOS]
                assert not any(is_open) or (stops and not any(is_open[: stops[0]]))
    assert finished == set(range(len(requests)))


@pytest.mark.parametrize("revise", ["remask", "edit"])
def test_no_revision_happens_where_nothing_is_doubtful(script, revise):
    backend = script(lambda row, at, call: logits_of(**{f"t{at}": 0.9}))
    plain = run(backend, steps=2, max_new_tokens=6, block_size=6)
    revised = run(backend, steps=2, max_new_tokens=6, block_size=6, revise=revise)
    assert [event.answer_BC.tolist() for event in plain] == [event.answer_BC.tolist() for event in revised]
