"""The `dllm` section and the table of objectives."""

from __future__ import annotations

import dataclasses
import importlib
from types import SimpleNamespace

import pytest

from unmask.config.objective import MODES, DllmConfig
from unmask.config.reader import read_section
from unmask.errors import ConfigError
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.objectives.registry import OBJECTIVES, build_objective, check_against_model

MODEL = SimpleNamespace(mask_token_id=29, rows=32, canvas_length=16, vocab_size=32, eos_token_id=5)
MASK = SimpleNamespace(model_type="llada", noise="mask", attention="bidirectional")
CANVAS = SimpleNamespace(model_type="diffusion_gemma", noise="uniform", attention="canvas")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mode": "mdml"}, "dllm.mode: 'mdml' is not one of .*did you mean 'mdlm'"),
        ({"mode": "block_difusion"}, "dllm.mode: .*did you mean 'block_diffusion'"),
        ({"mode": None}, "dllm.mode"),
        ({"eps": 0}, "dllm.eps: must lie between 0 and 1"),
        ({"eps": 1.0}, "dllm.eps"),
        ({"eps": -1e-3}, "dllm.eps"),
        ({"mask_token_id": -1}, "dllm.mask_token_id: must not be negative"),
        ({"mask_token_id": "29"}, "dllm.mask_token_id: expected an integer"),
        ({"normalization": "tokens"}, "dllm.normalization: .*did you mean 'token'"),
        ({"time_sampling": "stratify"}, "dllm.time_sampling: .*did you mean 'stratified'"),
        ({"supervise_padding": "yes"}, "dllm.supervise_padding: expected true or false"),
        ({"suprevise_padding": True}, "dllm.suprevise_padding: unknown key .did you mean 'supervise_padding'"),
    ],
)
def test_bad_values_are_refused(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_section(DllmConfig, values, "dllm")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"eps": 2.0}, "dllm.eps: must lie between 0 and 1"),
        ({"encoder_loss_weight": -0.5}, "dllm.encoder_loss_weight: must be at least 0"),
        ({"encoder_loss_weight": float("inf")}, "dllm.encoder_loss_weight: expected a finite number"),
        ({"encoder_loss_weight": float("nan")}, "dllm.encoder_loss_weight"),
        ({"self_conditioning_p": 1.5}, r"dllm.self_conditioning_p: must lie in \[0, 1\]"),
        ({"self_conditioning_p": -0.1}, "dllm.self_conditioning_p"),
        ({"freeze_router": "no"}, "dllm.freeze_router: expected true or false"),
        ({"stop_gradient_to_encoder": 1}, "dllm.stop_gradient_to_encoder: expected true or false"),
        ({"block_size": "256"}, "dllm.block_size: expected an integer"),
        ({"block_sise": 256}, "dllm.block_sise: unknown key .did you mean 'block_size'"),
    ],
)
def test_bad_values_of_block_diffusion_are_refused(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_section(DllmConfig, {"mode": "block_diffusion", **values}, "dllm")


@pytest.mark.parametrize("mode", MODES)
def test_a_field_of_another_mode_is_refused_whatever_its_value(mode: str) -> None:
    """A value that equals the other mode's default would do nothing either."""
    values = {
        "mask_token_id": 3, "supervise_padding": False, "normalization": "token", "block_size": 16, "vocab_size": 32,
        "encoder_loss_weight": 1.0, "self_conditioning_p": 0.5, "freeze_router": True,
        "stop_gradient_to_encoder": False, "eps": 0.1, "time_sampling": "iid",
    }  # fmt: skip
    assert set(values) == {field.name for field in dataclasses.fields(DllmConfig)} - {"mode"}
    own = MODES[mode]
    for name, value in values.items():
        section = {"mode": mode, name: value}
        if name in own:
            assert getattr(read_section(DllmConfig, section, "dllm"), name) == value
            continue
        owner = next(other for other in OBJECTIVES if name in MODES[other])
        with pytest.raises(ConfigError, match=f"dllm.{name}: .* has no meaning for mode {mode}; .*belongs to {owner}"):
            read_section(DllmConfig, section, "dllm")


def test_fields_left_out_take_their_modes_defaults() -> None:
    for mode, defaults in MODES.items():
        section = DllmConfig(mode=mode)
        for field in dataclasses.fields(DllmConfig):
            if field.name != "mode":
                assert getattr(section, field.name) == defaults.get(field.name)
    assert DllmConfig(mode="block_diffusion").freeze_router is True
    assert DllmConfig(mode="block_diffusion").supervise_padding is None


def test_the_mask_token_must_be_the_models() -> None:
    for fine in (None, 29):
        check_against_model(DllmConfig(mask_token_id=fine), MASK, MODEL)
    with pytest.raises(ConfigError, match="dllm.mask_token_id: 7 contradicts .* 29; leave the field out"):
        check_against_model(DllmConfig(mask_token_id=7), MASK, MODEL)
    for outside in (32, 10**9):
        with pytest.raises(ConfigError, match=f"dllm.mask_token_id: {outside} is outside .* 32; .* says 29"):
            check_against_model(DllmConfig(mask_token_id=outside), MASK, MODEL)


def test_canvas_and_vocabulary_must_be_the_models() -> None:
    for values in ({}, {"block_size": 16}, {"vocab_size": 32, "block_size": 16}):
        check_against_model(DllmConfig(mode="block_diffusion", **values), CANVAS, MODEL)
    for name, value, said in (("block_size", 32, "canvas_length 16"), ("vocab_size", 31, "vocab_size 32")):
        section = DllmConfig(mode="block_diffusion", **{name: value})
        with pytest.raises(ConfigError, match=f"dllm.{name}: {value} contradicts .* {said}; leave the field out"):
            check_against_model(section, CANVAS, MODEL)


def test_a_family_that_cannot_serve_the_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="dllm.mode: mdlm: .*gemma is not trained with mask noise; use .*_diffusion"):
        check_against_model(DllmConfig(), CANVAS, MODEL)
    with pytest.raises(ConfigError, match="block_diffusion: llada is not trained with uniform noise; use .*: mdlm"):
        check_against_model(DllmConfig(mode="block_diffusion"), MASK, MODEL)
    other = SimpleNamespace(model_type="other", noise="mask", attention="block_causal")
    with pytest.raises(ConfigError, match="dllm.mode: mdlm: other has no bidirectional attention; no objective trains"):
        check_against_model(DllmConfig(), other, MODEL)


def test_build_passes_the_options_on() -> None:
    section = DllmConfig(eps=0.01, normalization="sequence", time_sampling="stratified")
    assert build_objective(section, MODEL) == MDLM(29, 0.01, "sequence", "stratified")
    assert build_objective(DllmConfig(), MODEL) == MDLM(29, 1e-3, "token", "iid")
    section = DllmConfig(
        mode="block_diffusion", eps=0.02, encoder_loss_weight=0.3, self_conditioning_p=0.1,
        stop_gradient_to_encoder=True, time_sampling="stratified",
    )  # fmt: skip
    assert build_objective(section, MODEL) == CanvasDiffusion(16, 32, 5, 0.02, 0.3, 0.1, True, "stratified")
    section = DllmConfig(mode="block_diffusion")
    assert build_objective(section, MODEL) == CanvasDiffusion(16, 32, 5, 1e-3, 1.0, 0.5, False, "iid")


def test_every_entry_of_the_table_can_be_built() -> None:
    assert set(OBJECTIVES) == set(MODES)
    for mode, entry in OBJECTIVES.items():
        built = build_objective(DllmConfig(mode=mode), MODEL)
        assert type(built) is getattr(importlib.import_module(entry.module), entry.class_name)
        assert set(entry.options) <= set(MODES[mode])
        # A field that nobody can set would be a field that does nothing.
        assert set(MODES[mode]) <= {field.name for field in dataclasses.fields(DllmConfig)}
