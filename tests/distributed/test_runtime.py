"""The device of a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unmask.announce import matmul_notes
from unmask.config import config_from_mapping
from unmask.config.distributed import DistributedConfig
from unmask.distributed.runtime import build_runtime, matmul_dtype, pick_device, set_switches
from unmask.errors import ConfigError


def test_a_missing_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device.*--device cpu"):
        pick_device("cuda")


def test_autocast_computes_in_bf16_and_only_there() -> None:
    matrix = torch.ones(2, 2)
    for dtype, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        runtime = build_runtime(DistributedConfig(autocast_dtype=dtype, device="cpu"))  # pyright: ignore[reportArgumentType]
        with runtime.autocast():
            assert (matrix @ matrix).dtype == expected
        assert (matrix @ matrix).dtype == torch.float32
        assert runtime.memory_gib() > 0.01


@pytest.mark.parametrize(
    ("device", "hardware", "section", "expected"),
    [
        ("cuda", True, {}, "bfloat16"),
        ("cuda", False, {}, "float32"),
        ("cpu", True, {}, "float32"),
        ("cuda", True, {"autocast_dtype": "float32"}, "float32"),
        ("cpu", False, {"autocast_dtype": "bfloat16"}, "bfloat16"),
        ("cpu", False, {"mp_policy": {"param_dtype": "bfloat16"}}, "bfloat16"),
    ],
)
def test_the_matmuls_dtype_is_chosen_by_the_device_and_said(
    monkeypatch: pytest.MonkeyPatch, device: str, hardware: bool, section: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: hardware)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    values: dict[str, Any] = {"model": {"pretrained_model_name_or_path": "a"}, "dataset": {"path_or_dataset_id": "b"}}
    values["step_scheduler"] = {"max_steps": 1}
    config = config_from_mapping({**values, "distributed": section}).config
    place = torch.device(device)
    assert matmul_dtype(config, place) == expected
    notes = " ".join(matmul_notes(config, place))
    assert ("autocast_dtype: auto" in notes) == ("autocast_dtype" not in section)
    assert ("tensor cores idle" in notes) == (device == "cuda" and expected == "float32")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # TF32
    assert "idle" not in " ".join(matmul_notes(config, place))


def test_checkpointing_is_switched() -> None:
    class Layer(nn.Module):
        activation_checkpointing = False

    model = nn.Sequential(Layer(), nn.Linear(2, 2))
    section = DistributedConfig(activation_checkpointing=True, device="cpu")
    set_switches(model, section, build_runtime(section))
    assert model[0].activation_checkpointing is True


def test_the_peak_is_this_processs_own() -> None:
    """A parent's size must not show: Linux hands ru_maxrss on to what a process starts."""
    ballast = torch.ones(2**27)  # 512 MiB in this process
    code = "from unmask.distributed.runtime import _peak_resident_gib; print(_peak_resident_gib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ballast.numel() and float(done.stdout) < 0.375


def test_the_attention_kernel_is_set_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(nn.Module):
        attention_kernel = "sdpa"

    model, section = nn.Sequential(Layer()), DistributedConfig(attention="flex", device="cpu")
    with pytest.raises(ConfigError, match=r"distributed\.attention: flex needs a CUDA.* on cpu; set attention: sdpa"):
        set_switches(model, section, build_runtime(section))
    monkeypatch.setattr("unmask.distributed.runtime.flex_available", lambda device: True)
    set_switches(model, section, build_runtime(section))
    assert model[0].attention_kernel == "flex"
    set_switches(model, DistributedConfig(device="cpu"), build_runtime(section))
    assert model[0].attention_kernel == "sdpa"


def test_blocks_are_compiled_or_it_is_refused(monkeypatch: pytest.MonkeyPatch, fixtures: Path) -> None:
    from unmask.models.loading import load_model

    section = DistributedConfig(compile=True, device="cpu")
    model = load_model(str(fixtures / "llada_tiny"), "float32")
    with pytest.raises(ConfigError, match=r"distributed\.compile: needs a CUDA device with Triton.* on cpu; set false"):
        set_switches(model, section, build_runtime(section))
    plain = model(torch.arange(12)[None])
    names = list(model.state_dict())
    compiled: list[Callable[..., Any]] = []

    def counted(
        function: Callable[..., Any], **_: Any
    ) -> Callable[..., Any]:  # compiling itself is tested where it is fast
        return lambda *inputs: compiled.append(function) or function(*inputs)

    monkeypatch.setattr("unmask.distributed.runtime.compiles_on", lambda device: True)
    monkeypatch.setattr(torch, "compile", counted)
    set_switches(model, section, build_runtime(section))
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(torch.arange(12)[None]), plain)
    assert len(compiled) == model.config.n_layers  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_training_on_cuda_leaves_out_cudnns_attention(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose backward pass gives NaN under a mask at some lengths (pytorch issue 196678)."""
    switched: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    build_runtime(DistributedConfig(device=device))  # pyright: ignore[reportArgumentType]
    assert switched == ([False] if device == "cuda" else [])
