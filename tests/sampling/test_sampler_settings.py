from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import ModelError, SamplingError
from unmask.sampling.settings import (
    CanvasSettings,
    MaskSettings,
    SamplerConfig,
    block_quotas,
    block_sizes,
    canvas_defaults,
    resolve,
)


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
        ("entropy_bound", -0.1, "at least 0"),
        ("t_max", 0, "above 0"),
        ("t_min", -1.0, "at least 0"),
        ("stability_threshold", -1, "at least 0"),
        ("stability_threshold", 1.0, "integer"),
        ("confidence_threshold", "sure", "number"),
    ],
)
def test_a_bad_setting_is_refused_by_name(field, value, says):
    with pytest.raises(SamplingError, match=f"^{field}: .*{says}"):
        SamplerConfig(**{field: value})


def test_a_threshold_needs_a_confidence():
    with pytest.raises(SamplingError, match="^remasking: random scores cannot be compared with threshold 0.9; use"):
        SamplerConfig(remasking="random", threshold=0.9)
    assert MaskSettings(remasking="random").rule == "quota"


def test_steps_are_shared_over_blocks_with_the_remainder_first():
    sampler = MaskSettings(steps=7, max_new_tokens=20, block_size=8)
    assert block_sizes(20, 8) == (8, 8, 4)
    assert block_quotas(sampler) == ((3, 3, 2), (4, 4), (2, 2))


def test_a_block_longer_than_the_answer_is_one_short_block():
    assert block_quotas(MaskSettings(steps=3, max_new_tokens=5, block_size=32)) == ((2, 2, 1),)


def test_every_block_has_a_step_however_few_there_are():
    assert block_quotas(MaskSettings(steps=1, max_new_tokens=8, block_size=2)) == ((2,), (2,), (2,), (2,))


def test_steps_that_settle_nothing_are_left_out():
    assert block_quotas(MaskSettings(steps=100, max_new_tokens=3, block_size=2)) == ((1, 1), (1,))


@given(steps=st.integers(1, 70), length=st.integers(1, 40), block=st.integers(1, 50))
@settings(deadline=None, max_examples=100)
def test_quotas_fill_every_block_and_fall(steps, length, block):
    quotas = block_quotas(MaskSettings(steps=steps, max_new_tokens=length, block_size=block))
    assert tuple(sum(quota) for quota in quotas) == block_sizes(length, block)
    assert sum(block_sizes(length, block)) == length
    for quota in quotas:
        assert min(quota) >= 1 and max(quota) - min(quota) <= 1 and list(quota) == sorted(quota, reverse=True)
    assert sum(map(len, quotas)) <= max(steps, len(quotas))


def test_settings_need_no_torch():
    code = "import sys, unmask.sampling.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Canvas16:
    canvas_length = 16


RELEASED = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "diffusiongemma_26b_a4b_it" / "generation_config.json").read_text()
)


def test_the_released_generation_config_gives_the_released_settings():
    assert canvas_defaults(Canvas16, RELEASED) == CanvasSettings(block_size=16)
    assert canvas_defaults(Canvas16, dict.fromkeys(RELEASED)) == CanvasSettings(block_size=16)
    assert canvas_defaults(Canvas16, {}) == CanvasSettings(block_size=16)


def test_a_checkpoints_own_values_come_before_the_released_and_the_callers_before_those():
    stored = {"max_denoising_steps": 9, "t_min": 0.2, "sampler_config": {"entropy_bound": 0.7}, "max_new_tokens": 77}
    defaults = canvas_defaults(Canvas16, stored)
    assert (defaults.steps, defaults.t_min, defaults.entropy_bound, defaults.t_max) == (9, 0.2, 0.7, 0.8)
    settings = resolve(SamplerConfig(steps=3, max_new_tokens=20, eos="suppress"), defaults)
    assert (settings.steps, settings.max_new_tokens, settings.length, settings.t_min) == (3, 20, 32, 0.2)
    assert resolve(None, defaults) == defaults == resolve(SamplerConfig(block_size=16), defaults)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"t_max": -1.0}, "t_max: must be a finite number above 0"),
        ({"max_denoising_steps": 0}, "steps: must be an integer of at least 1"),
        ({"t_min": 0.9}, "t_min: 0.9 is above t_max 0.8"),
        ({"sampler_config": {"_cls_name": "Other", "top_k": 3}}, "sampler_config must hold entropy_bound alone"),
    ],
)
def test_a_bad_generation_config_is_refused_by_file_and_entry(stored, says):
    with pytest.raises(ModelError, match=f"^generation_config.json: {says}"):
        canvas_defaults(Canvas16, stored)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("remasking", "low_confidence"), ("threshold", 0.9), ("cfg_scale", 0.0)]
)
def test_lladas_settings_are_refused_for_a_canvas_by_name(field, value):
    with pytest.raises(SamplingError, match=f"^{field}: DiffusionGemma's sampler has no such setting"):
        resolve(SamplerConfig(**{field: value}), CanvasSettings())


@pytest.mark.parametrize("field", ["entropy_bound", "t_min", "t_max", "stability_threshold", "confidence_threshold"])
def test_a_canvass_settings_are_refused_for_llada_by_name(field):
    with pytest.raises(SamplingError, match=f"^{field}: LLaDA's sampler has no such setting"):
        resolve(SamplerConfig(**{field: 1}), MaskSettings())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"block_size": 32}, "block_size: 32 is not the model's canvas of 256 tokens"),
        ({"eos": "defer"}, "eos: .* none is deferred"),
        ({"t_min": 0.9}, "t_min: 0.9 is above t_max 0.8"),
    ],
)
def test_what_contradicts_the_canvas_is_refused(fields, says):
    with pytest.raises(SamplingError, match=f"^{says}"):
        resolve(SamplerConfig(**fields), CanvasSettings())


def test_the_temperature_falls_from_t_max_towards_t_min():
    settings = CanvasSettings(steps=4, t_min=0.4, t_max=0.8)
    assert [settings.temperature(step) for step in range(4)] == pytest.approx([0.8, 0.7, 0.6, 0.5])
