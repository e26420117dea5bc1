from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from unmask.config.sampler import SamplerConfig
from unmask.errors import ModelError, SamplingError
from unmask.models.decoder.families import DREAM
from unmask.models.diffusion_gemma.family import FAMILY as DIFFUSION_GEMMA
from unmask.models.llada.family import FAMILY as LLADA
from unmask.sampling.settings import SCHEMES, SETTINGS, SamplerSettings, family_settings, resolve_settings


class Config:
    canvas_length = 256
    max_sequence_length = 4096


def resolve(sampler: SamplerConfig | None, family=LLADA, config=Config, generation=None) -> SamplerSettings:
    return resolve_settings(sampler, family, config, generation or {})


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
        ("factor", -1.0, "at least 0"),
        ("refresh_interval", 0, "at least 1"),
        ("revise_threshold", float("nan"), "finite"),
        ("remasking", "entropi", "did you mean 'entropy'"),
        ("cache", "duel", "did you mean 'dual'"),
        ("revise", "remaks", "did you mean 'remask'"),
        ("preset", "fats", "did you mean 'fast'"),
    ],
)
def test_a_bad_setting_is_refused_by_name(field, value, says):
    with pytest.raises(SamplingError, match=f"^{field}: .*{says}"):
        SamplerConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"remasking": "random", "threshold": 0.9},
            "remasking: random scores cannot be compared with threshold 0.9; use",
        ),
        ({"remasking": "entropy", "factor": 1.0}, "remasking: entropy scores cannot be compared with factor 1.0; use"),
        ({"remasking": "margin", "entropy_bound": 0.1}, "remasking: margin .* entropy_bound 0.1; use entropy"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold: cannot be set together with factor"),
        ({"factor": 1.0, "entropy_bound": 1.0}, "factor: cannot be set together with entropy_bound"),
    ],
)
def test_rules_and_scores_that_do_not_go_together_are_refused(fields, says):
    with pytest.raises(SamplingError, match=f"^{says}"):
        SamplerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "rule", "score"),
    [
        ({}, "quota", "low_confidence"),
        ({"remasking": "random"}, "quota", "random"),
        ({"threshold": 0.9, "remasking": "margin"}, "threshold", "margin"),
        ({"factor": 1.0}, "factor", "low_confidence"),
        ({"entropy_bound": 0.2}, "entropy_bound", "entropy"),
    ],
)
def test_the_rule_follows_from_what_is_set(fields, rule, score):
    settings = resolve(SamplerConfig(**fields))
    assert (settings.rule, settings.remasking) == (rule, score)


def test_an_entropy_bound_with_another_score_is_refused_where_settings_are_made():
    with pytest.raises(SamplingError, match="^remasking: low_confidence scores"):
        family_settings(LLADA, entropy_bound=0.2)


@pytest.mark.parametrize(
    ("fields", "family", "says"),
    [
        (
            {"cache": "block"},
            LLADA,
            "cache: LLaDA's .* no block, .* both ways, .*; use none, prefix or dual",
        ),
        (
            {"cache": "prefix"},
            DIFFUSION_GEMMA,
            "cache: DiffusionGemma's .* no prefix, which is approxi.*; use block or none",
        ),
        ({"cache": "dual"}, DIFFUSION_GEMMA, "cache: DiffusionGemma's sampler has no dual"),
        ({"revise": "redraw"}, LLADA, "revise: LLaDA's sampler has no redraw; use none, remask or edit"),
        ({"revise": "none"}, DIFFUSION_GEMMA, "revise: DiffusionGemma's sampler has no none; use redraw"),
        ({"refresh_interval": 4}, LLADA, "refresh_interval: there is no cache"),
        ({"revise_threshold": 0.5}, LLADA, "revise_threshold: nothing is revised"),
        ({"revise": "remask"}, LLADA, "revise: remask takes .* 128 steps for 128 tokens .* set threshold"),
        ({"revise": "remask", "steps": 10, "max_new_tokens": 10, "block_size": 5}, LLADA, "revise: remask"),
        ({"revise": "remask", "threshold": 1.5}, LLADA, "revise: remask .* with threshold 1.5 that is one"),
        ({"refresh_interval": 4}, DIFFUSION_GEMMA, "refresh_interval: DiffusionGemma's sampler has no such setting"),
        ({"factor": 1.0}, DIFFUSION_GEMMA, "factor: DiffusionGemma's sampler has no such setting"),
    ],
)
def test_what_a_family_does_not_permit_is_refused_by_name(fields, family, says):
    with pytest.raises(SamplingError, match=f"^{says}"):
        resolve(SamplerConfig(**fields), family)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 64},
        {"threshold": 0.9},
        {"threshold": 1.0},
        {"steps": 10, "max_new_tokens": 10, "block_size": 4},  # the blocks have 4, 3 and 3 calls
    ],
)
def test_remask_is_taken_where_a_call_may_commit_several(fields):
    assert resolve(SamplerConfig(revise="remask", **fields)).revise == "remask"


def test_by_default_an_answer_takes_at_most_half_the_context_and_an_explicit_length_stays():
    class Short:
        canvas_length = 16
        max_sequence_length = 100

    class Long(Short):
        max_sequence_length = 4096

    for family, lengths in ((LLADA, [50, 128]), (DIFFUSION_GEMMA, [50, 256])):
        assert [resolve(None, family, config).max_new_tokens for config in (Short, Long)] == lengths
    assert resolve(None, DIFFUSION_GEMMA, Short, {"max_new_tokens": 90}).max_new_tokens == 90
    assert resolve(SamplerConfig(max_new_tokens=99), LLADA, Short).max_new_tokens == 99


def test_what_is_approximate_says_so():
    mask, canvas = partial(family_settings, LLADA), partial(family_settings, DIFFUSION_GEMMA, block_size=256)
    assert mask().exact and canvas().exact and canvas(cache="none").exact and mask().note == ""
    assert mask(threshold=0.5, revise="remask").approximations == ()
    prefix = mask(cache="prefix")
    assert not prefix.exact and prefix.drops_after_stop
    assert "prefix cache, computed anew at block starts" in prefix.approximations
    often = mask(cache="dual", refresh_interval=4, revise="edit")
    assert (
        often.approximations == ("dual cache, computed anew at block starts and every 4 calls",)
        and not often.drops_after_stop
    )
    assert often.note == f"approximate sampling: {often.approximations[0]}"
    assert mask(cache="dual", refresh_interval=1).exact  # every call is a full forward


def test_a_preset_is_the_familys_own_and_what_is_given_wins_over_it():
    fast = resolve(SamplerConfig(preset="fast"))
    assert fast == family_settings(LLADA, **LLADA.sampler.presets["fast"]) and not fast.exact
    assert resolve(SamplerConfig(preset="reference", steps=9)) == family_settings(LLADA, steps=9)
    found = resolve(SamplerConfig(preset="balanced", steps=7), DIFFUSION_GEMMA, Canvas16, {"t_min": 0.1})
    expected = {"block_size": 16, "t_min": 0.1} | DIFFUSION_GEMMA.sampler.presets["balanced"] | {"steps": 7}
    assert found == family_settings(DIFFUSION_GEMMA, **expected)
    assert resolve(SamplerConfig(preset="fast", cache="none")).cache == "none"


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"steps": 8}, "quota"),
        ({"factor": 1.0}, "factor"),
        ({"entropy_bound": 0.3}, "entropy_bound"),
        ({"remasking": "random"}, "quota"),
        ({"remasking": "entropy"}, "quota"),
        ({"remasking": "margin"}, "threshold"),
        ({"remasking": "low_confidence"}, "threshold"),
        ({"threshold": 0.5}, "threshold"),
        ({"max_new_tokens": 8}, "threshold"),
    ],
)
def test_a_given_schedule_rule_or_score_takes_the_place_of_the_presets_rule(given, rule):
    settings = resolve(SamplerConfig(preset="fast", **given))
    assert settings.rule == rule and settings.cache == "dual"
    assert all(getattr(settings, name) == value for name, value in given.items())


def test_a_preset_that_a_family_lacks_is_refused_by_name():
    with pytest.raises(SamplingError, match="preset: Dream has no reference, whose sampler .*use balanced or fast"):
        resolve(SamplerConfig(preset="reference"), DREAM)


@pytest.mark.parametrize("family", [LLADA, DIFFUSION_GEMMA], ids=lambda family: family.name)
def test_every_family_has_every_preset_and_settings_that_its_sampler_takes(family):
    assert set(family.sampler.presets) == {"reference", "balanced", "fast"} and not family.sampler.presets["reference"]
    for preset in family.sampler.presets:
        settings = resolve(SamplerConfig(preset=preset), family)
        assert set(settings.values) == set(SCHEMES[family.noise, family.attention].fields) <= set(SETTINGS)


def test_settings_of_no_sampler_are_refused():
    with pytest.raises(SamplingError, match="^LLaDA: no sampler for uniform noise and bidirectional attention"):
        family_settings(replace(LLADA, noise="uniform"))


def test_settings_need_no_torch():
    code = "import sys, unmask.sampling.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Canvas16:
    canvas_length = 16
    max_sequence_length = 512


RELEASED = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "diffusiongemma_26b_a4b_it" / "generation_config.json").read_text()
)


def test_the_released_generation_config_gives_the_released_settings():
    for stored in (RELEASED, dict.fromkeys(RELEASED), {}):
        assert resolve(None, DIFFUSION_GEMMA, Canvas16, stored) == family_settings(DIFFUSION_GEMMA, block_size=16)


def test_a_checkpoints_own_values_come_before_the_released_and_the_callers_before_those():
    stored = {"max_denoising_steps": 9, "t_min": 0.2, "sampler_config": {"entropy_bound": 0.7}, "max_new_tokens": 77}
    own = resolve(None, DIFFUSION_GEMMA, Canvas16, stored)
    assert (own.steps, own.t_min, own.entropy_bound, own.t_max) == (9, 0.2, 0.7, 0.8)
    settings = resolve(SamplerConfig(steps=3, max_new_tokens=20, eos="suppress"), DIFFUSION_GEMMA, Canvas16, stored)
    assert (settings.steps, settings.max_new_tokens, settings.length, settings.t_min) == (3, 20, 32, 0.2)
    assert resolve(SamplerConfig(block_size=16), DIFFUSION_GEMMA, Canvas16, stored) == own


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
        resolve(None, DIFFUSION_GEMMA, Canvas16, stored)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("remasking", "low_confidence"), ("threshold", 0.9), ("cfg_scale", 0.0)]
)
def test_lladas_settings_are_refused_for_a_canvas_by_name(field, value):
    with pytest.raises(SamplingError, match=f"^{field}: DiffusionGemma's sampler has no such setting"):
        resolve(SamplerConfig(**{field: value}), DIFFUSION_GEMMA)


@pytest.mark.parametrize("field", ["t_min", "t_max", "stability_threshold", "confidence_threshold"])
def test_a_canvass_settings_are_refused_for_llada_by_name(field):
    with pytest.raises(SamplingError, match=f"^{field}: LLaDA's sampler has no such setting"):
        resolve(SamplerConfig(**{field: 1}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"block_size": 32}, "block_size: 32 is not the model's canvas_length of 256; leave it out"),
        (
            {"eos": "defer"},
            "eos: DiffusionGemma's .* no defer, since a canvas .*; use allow or suppress",
        ),
        ({"t_min": 0.9}, "t_min: 0.9 is above t_max 0.8"),
    ],
)
def test_what_contradicts_the_canvas_is_refused(fields, says):
    with pytest.raises(SamplingError, match=f"^{says}"):
        resolve(SamplerConfig(**fields), DIFFUSION_GEMMA)


def test_the_temperature_falls_from_t_max_towards_t_min():
    settings = family_settings(DIFFUSION_GEMMA, block_size=16, steps=4, t_min=0.4, t_max=0.8)
    assert [settings.temperature_at(step) for step in range(4)] == pytest.approx([0.8, 0.7, 0.6, 0.5])
