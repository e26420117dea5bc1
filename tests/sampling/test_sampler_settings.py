from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import SamplingError
from unmask.sampling.settings import SamplerConfig, block_quotas, block_sizes


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 0, "at least 1"),
        ("steps", -3, "got -3"),
        ("steps", True, "integer"),
        ("steps", 2.0, "integer"),
        ("max_new_tokens", 0, "at least 1"),
        ("block_size", "32", "got '32'"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "finite"),
        ("temperature", "hot", "number"),
        ("threshold", -1.0, "at least 0"),
        ("threshold", float("inf"), "finite"),
        ("cfg_scale", -1.0, "at least 0"),
        ("cfg_scale", False, "number"),
        ("remasking", "low_confidense", "did you mean 'low_confidence'"),
        ("eos", "never", "allow, suppress, defer"),
        ("eos", [], "allow, suppress, defer"),
    ],
)
def test_a_bad_setting_is_refused_by_name(field, value, says):
    with pytest.raises(SamplingError, match=f"^{field}: .*{says}"):
        SamplerConfig(**{field: value})


def test_a_threshold_needs_a_confidence():
    with pytest.raises(SamplingError, match="^remasking: random scores cannot be compared with threshold 0.9; use"):
        SamplerConfig(remasking="random", threshold=0.9)
    assert SamplerConfig(remasking="random").rule == "quota"


def test_steps_are_shared_over_blocks_with_the_remainder_first():
    sampler = SamplerConfig(steps=7, max_new_tokens=20, block_size=8)
    assert block_sizes(20, 8) == (8, 8, 4)
    assert block_quotas(sampler) == ((3, 3, 2), (4, 4), (2, 2))


def test_a_block_longer_than_the_answer_is_one_short_block():
    assert block_quotas(SamplerConfig(steps=3, max_new_tokens=5, block_size=32)) == ((2, 2, 1),)


def test_every_block_has_a_step_however_few_there_are():
    assert block_quotas(SamplerConfig(steps=1, max_new_tokens=8, block_size=2)) == ((2,), (2,), (2,), (2,))


def test_steps_that_settle_nothing_are_left_out():
    assert block_quotas(SamplerConfig(steps=100, max_new_tokens=3, block_size=2)) == ((1, 1), (1,))


@given(steps=st.integers(1, 70), length=st.integers(1, 40), block=st.integers(1, 50))
@settings(deadline=None, max_examples=100)
def test_quotas_fill_every_block_and_fall(steps, length, block):
    quotas = block_quotas(SamplerConfig(steps=steps, max_new_tokens=length, block_size=block))
    assert tuple(sum(quota) for quota in quotas) == block_sizes(length, block)
    assert sum(block_sizes(length, block)) == length
    for quota in quotas:
        assert min(quota) >= 1 and max(quota) - min(quota) <= 1 and list(quota) == sorted(quota, reverse=True)
    assert sum(map(len, quotas)) <= max(steps, len(quotas))


def test_settings_need_no_torch():
    code = "import sys, unmask.sampling.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
