from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.config.sampler import SamplerConfig
from unmask.sampling.backends import bidirectional
from unmask.sampling.backends.bidirectional import length_groups
from unmask.sampling.generate import generate


def cost(groups, lengths, forward) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + forward for group in groups)


def test_like_rows_go_together_and_unlike_ones_apart():
    assert length_groups((32,) * 4) == ((0, 1, 2, 3),)
    assert length_groups((384, 32, 400, 32)) == ((1, 3), (0, 2))
    assert length_groups((32, 60)) == ((0, 1),)  # a forward more would cost more than 28 positions of padding
    assert length_groups(()) == ()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from([0, 7, 30]))
def test_no_other_split_costs_less(lengths, forward):
    groups = length_groups(tuple(lengths), forward)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert [max(lengths[row] for row in group) for group in groups] == sorted(
        max(lengths[row] for row in group) for group in groups
    )
    least = min(
        cost([[row for row, name in enumerate(names) if name == group] for group in set(names)], lengths, forward)
        for names in product(range(len(lengths)), repeat=len(lengths))
    )
    assert cost(groups, lengths, forward) == least


@pytest.mark.parametrize("values", [{}, {"cfg_scale": 1.0}, {"cache": "prefix"}, {"cache": "dual", "cfg_scale": 1.0}])
def test_answers_do_not_depend_on_the_groups(small_model, monkeypatch, values):
    model, prompts = small_model(n_layers=2), [[3, 9, 4], [11, 2, 30, 8, 5, 17, 21], [6], [1, 2, 3]]
    sampler = SamplerConfig(max_new_tokens=12, block_size=4, threshold=0.2, eos="suppress", **values)
    found = []
    for forward in (0, 1000):
        seen = set()

        def grouped(lengths, forward=forward, seen=seen):
            seen.add(len(groups := length_groups(lengths, forward)))
            return groups

        monkeypatch.setattr(bidirectional, "length_groups", grouped)
        answers = generate(model, prompts, sampler=sampler)
        found.append([(answer.token_ids, answer.stats.nfe) for answer in answers])
        assert max(seen) > 1 if forward == 0 else seen == {1}
    assert found[0] == found[1]
