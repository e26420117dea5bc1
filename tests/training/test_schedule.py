"""Learning rates and run lengths, as numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.config.training import LRSchedulerConfig, StepSchedulerConfig
from unmask.errors import FieldError
from unmask.training.loop import due, learning_rate


def rates(total: int, peak: float = 1.0, **fields) -> list[float]:
    section = LRSchedulerConfig(**fields)
    return [learning_rate(step, section, peak, total) for step in range(1, total + 1)]


def test_constant_after_warm_up() -> None:
    assert rates(6, lr_warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_warm_up_starts_from_the_initial_rate() -> None:
    assert rates(3, lr_warmup_steps=2, init_lr=0.5) == pytest.approx([0.75, 1.0, 1.0])


def test_linear_decay_reaches_its_end_after_the_last_step() -> None:
    assert rates(6, lr_decay_style="linear", lr_warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_decay() -> None:
    expected = [1.0, 0.8535533905932737, 0.5, 0.14644660940672627]
    assert rates(4, lr_decay_style="cosine") == pytest.approx(expected)
    assert rates(4, lr_decay_style="cosine", min_lr=0.2)[2] == pytest.approx(0.6)


def test_a_decay_may_end_before_the_run() -> None:
    assert rates(6, lr_decay_style="linear", lr_decay_steps=4, min_lr=0.1)[4:] == pytest.approx([0.1, 0.1])


def test_a_warm_up_left_open_is_a_tenth_of_the_run_and_at_most_1000_steps() -> None:
    section = LRSchedulerConfig(lr_warmup_steps=None)
    assert [section.warmup_steps(total) for total in (5, 50, 9999, 10**6)] == [0, 5, 999, 1000]
    assert rates(20, lr_warmup_steps=None)[:3] == pytest.approx([0.5, 1.0, 1.0])


@given(
    style=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 20),
    total=st.integers(1, 40),
    low=st.floats(0, 0.5),
)
def test_rates_stay_between_their_bounds_and_never_rise_after_warm_up(style, warmup, total, low) -> None:
    found = rates(total, lr_decay_style=style, lr_warmup_steps=warmup, min_lr=low)
    assert all(0 < rate <= 1 + 1e-12 for rate in found) or low == 0
    after = found[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(after, after[1:], strict=False))


def test_the_length_is_the_smaller_of_steps_and_epochs() -> None:
    assert StepSchedulerConfig(max_steps=100, num_epochs=3).total_steps(10) == 30
    assert StepSchedulerConfig(max_steps=20, num_epochs=3).total_steps(10) == 20
    assert StepSchedulerConfig(num_epochs=3).total_steps(7) == 21
    with pytest.raises(FieldError, match="has an end"):
        StepSchedulerConfig()


def test_due() -> None:
    assert [step for step in range(1, 10) if due(step, 4)] == [4, 8]
    assert not any(due(step, None) for step in range(1, 10))
