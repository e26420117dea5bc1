"""The `dllm` section and the table of objectives."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from unmask.errors import ConfigError
from unmask.objectives.mdlm import MDLM
from unmask.objectives.registry import OBJECTIVES, DllmConfig, build_objective, check_against_model
from unmask.sections import read_section

MODEL = SimpleNamespace(mask_token_id=29, rows=32)
PROVIDES = frozenset({"mask_token"})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mode": "mdml"}, "dllm.mode: 'mdml' is not one of .*did you mean 'mdlm'"),
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


def test_the_mask_token_must_be_the_models() -> None:
    for fine in (None, 29):
        check_against_model(DllmConfig(mask_token_id=fine), PROVIDES, "llada", MODEL)
    with pytest.raises(ConfigError, match="dllm.mask_token_id: 7 contradicts .* says 29; leave the field out"):
        check_against_model(DllmConfig(mask_token_id=7), PROVIDES, "llada", MODEL)
    for outside in (32, 10**9):
        with pytest.raises(ConfigError, match=f"dllm.mask_token_id: {outside} is outside .* 32; .* says 29"):
            check_against_model(DllmConfig(mask_token_id=outside), PROVIDES, "llada", MODEL)


def test_a_family_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="dllm.mode: mdlm needs mask_token, which other has not"):
        check_against_model(DllmConfig(), frozenset({"canvas"}), "other", MODEL)


def test_build_passes_the_options_on() -> None:
    section = DllmConfig(eps=0.01, normalization="sequence", time_sampling="stratified")
    assert build_objective(section, MODEL) == MDLM(29, 0.01, "sequence", "stratified")
    assert build_objective(DllmConfig(), MODEL) == MDLM(29, 1e-3, "token", "iid")


def test_every_entry_of_the_table_can_be_built() -> None:
    for mode, entry in OBJECTIVES.items():
        built = build_objective(DllmConfig(mode=mode), MODEL)
        assert type(built) is getattr(importlib.import_module(entry.module), entry.class_name)
        assert all(hasattr(DllmConfig(), option) for option in entry.options)
