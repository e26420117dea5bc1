"""Law: what is trained in bf16 learns what fp32 learns, where torch's AdamW on bf16 weights stands still."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unmask.cli import main
from unmask.config import config_from_mapping
from unmask.config.distributed import DistributedConfig
from unmask.config.model import ModelConfig
from unmask.config.training import OptimizerConfig
from unmask.distributed.runtime import build_runtime
from unmask.errors import CheckpointError, ConfigError
from unmask.models.registry import plan_model
from unmask.training.estimate import estimate_memory
from unmask.training.network import NetworkSettings, build_network, moments
from unmask.training.optim import MasterAdamW, build_optimizer, clip_gradients, masters_of

RATE = 1e-4
Train = Callable[..., Any]


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Return a network whose weights are bf16 numbers, in a dtype; the same one each time."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).bfloat16().to(dtype)
    return model


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(64, 16, generator=generator)
    return rows, rows[:, :8] * rows[:, 8:]


def fit(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int = 150) -> tuple[float, float]:
    """Return the loss after some steps, in fp32, and the share of weights that they changed."""
    before, (rows, wanted) = copy.deepcopy(model), examples()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(rows.to(model[0].weight.dtype)).float(), wanted).backward()
        optimizer.step()
    pairs = list(zip(model.parameters(), before.parameters(), strict=True))
    changed = sum(int((after != old).sum()) for after, old in pairs) / sum(after.numel() for after, _ in pairs)
    with torch.no_grad():
        return float(nn.functional.mse_loss(copy.deepcopy(model).float()(rows), wanted)), changed


def optimizer_of(model: nn.Module, **fields: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(lr=RATE, **fields), model)


@pytest.fixture(scope="module")
def fp32() -> tuple[float, float]:
    model = network(torch.float32)
    return fit(model, optimizer_of(model))


def test_masters_learn_what_fp32_learns_and_plain_bf16_stands_still(fp32: tuple[float, float]) -> None:
    start, _ = fit(network(), optimizer_of(network()), steps=0)
    ours, plain = network(), network()
    loss, changed = fit(ours, optimizer_of(ours))
    stalled, moved = fit(plain, torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.0))
    learnt = start - fp32[0]
    assert loss == pytest.approx(fp32[0], abs=0.02 * learnt) and changed > 0.9
    assert start - stalled < 0.6 * learnt and moved < 0.7


def test_stochastic_rounding_learns_what_fp32_learns(fp32: tuple[float, float]) -> None:
    start, _ = fit(network(), optimizer_of(network()), steps=0)
    ours = network()
    loss, changed = fit(ours, optimizer_of(ours, stochastic_rounding=True))
    assert loss == pytest.approx(fp32[0], abs=0.05 * (start - fp32[0])) and changed > 0.9


def test_a_weight_is_its_master_rounded() -> None:
    model = network()
    optimizer = optimizer_of(model)
    fit(model, optimizer, steps=5)
    masters = masters_of(optimizer)
    assert set(masters) == set(model.parameters())
    for parameter, master in masters.items():
        assert master.dtype == torch.float32 and torch.equal(parameter, master.bfloat16())
        assert all(moment.dtype == torch.float32 for moment in optimizer.state[master].values())


def test_fp32_parameters_have_no_masters() -> None:
    model = network(torch.float32)
    optimizer = optimizer_of(model)
    assert isinstance(optimizer, MasterAdamW) and masters_of(optimizer) == {}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("rounding", [False, True])
def test_weights_decay_where_a_step_is_less_than_the_rounding(rounding: bool) -> None:
    """1000 steps of a decay of 1e-4 each: exp(−0.1) of the weight, which plain bf16 would keep whole."""
    model = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    optimizer = optimizer_of(model, weight_decay=1.0, stochastic_rounding=rounding)
    for _ in range(1000):
        model.weight.grad = None
        (0.0 * model.weight).sum().backward()
        optimizer.step()
    assert float(model.weight.detach().float().mean()) == pytest.approx(0.905, abs=0.01)


def test_the_second_moment_shrinks_with_the_gradients() -> None:
    """In bf16 it would stay: 0.999 of a number rounds to that number, and steps would stay too small for good."""
    model = nn.Linear(8, 8, bias=False).bfloat16()
    optimizer = optimizer_of(model, stochastic_rounding=True)
    squares = optimizer.state[model.weight]["exp_avg_sq"]
    peak = 0.0
    for scale in [1.0] * 50 + [0.01] * 700:
        model.weight.grad = torch.full_like(model.weight, scale)
        optimizer.step()
        peak = max(peak, float(squares.max()))
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.bfloat16
    assert float(squares.max()) < 0.55 * peak


def test_gradients_of_micro_batches_are_added_in_fp32() -> None:
    """512 ones: in bf16 the sum stays at 256, whose next number is 258."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = optimizer_of(model)
    for _ in range(512):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is None  # it is in the master's, and takes no memory beside it
    assert float(masters_of(optimizer)[model.weight].grad) == 512
    assert float(clip_gradients(optimizer, 1.0)) == 512
    assert float(masters_of(optimizer)[model.weight].grad) == pytest.approx(1.0)
    optimizer.zero_grad()
    assert masters_of(optimizer)[model.weight].grad is None


def bf16(tiny, root: Path, **changes: Any) -> dict:
    return tiny.config(root, model__torch_dtype="bfloat16", **changes)


def test_a_run_in_bf16_learns_what_one_in_fp32_learns(tiny, tiny_base: Path, train_tiny: Train, tmp_path: Path) -> None:
    fixed = {"step_scheduler__max_steps": 30, "optimizer__lr": 1e-3}
    base = {"pretrained_model_name_or_path": str(tiny_base)}
    wide = train_tiny({**tiny.config(tmp_path / "fp32", **fixed), "model": base})
    narrow = train_tiny({**tiny.config(tmp_path / "bf16", **fixed), "model": {**base, "torch_dtype": "bfloat16"}})
    assert wide.losses[30] < 0.9 * wide.losses[1]
    for step, loss in wide.losses.items():
        assert narrow.losses[step] == pytest.approx(loss, rel=0.03)


def test_a_checkpoint_holds_bf16_weights_and_their_masters(tiny, train_tiny: Train, tmp_path: Path) -> None:
    folder = train_tiny(bf16(tiny, tmp_path, step_scheduler__max_steps=2)).root / "latest"
    weights, state = load_file(folder / "model.safetensors"), load_file(folder / "optimizer" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert set(state) == {f"{name}/{part}" for name in weights for part in ("master", "exp_avg", "exp_avg_sq", "step")}
    assert all(torch.equal(weights[name], state[f"{name}/master"].bfloat16()) for name in weights)


def test_a_module_trained_whole_beside_an_adapter_learns(tiny, tiny_base: Path, train_tiny: Train, tmp_path) -> None:
    """Ten steps of 1e-4, each of which would be lost in the embedding's bf16."""
    base = load_file(tiny_base / "model.safetensors")["model.transformer.wte.weight"]

    def moved(dtype: str, start: Tensor) -> Tensor:
        values = tiny.config(
            tmp_path / dtype, step_scheduler__max_steps=10, optimizer__lr=1e-4,
            peft={"r": 2, "modules_to_save": ["*.wte", "*norm"]},
            model={"pretrained_model_name_or_path": str(tiny_base), "torch_dtype": dtype},
        )  # fmt: skip
        folder = train_tiny(values).root / "latest"
        state = {**load_file(folder / "optimizer" / "model.safetensors")}
        names = {name.rpartition("/")[0] for name in state if name.endswith("/master")}
        assert len(names) == (1 if dtype == "bfloat16" else 0)  # adapters and norms are fp32
        if not names:
            state = load_file(folder / "adapter_model.safetensors")
        (after,) = (value for name, value in state.items() if "wte" in name and "exp_" not in name and value.dim() == 2)
        return after - start

    wide, narrow = moved("float32", base), moved("bfloat16", base.bfloat16().float())
    assert nn.functional.cosine_similarity(wide.flatten(), narrow.flatten(), dim=0) > 0.9
    assert float(narrow.norm()) == pytest.approx(float(wide.norm()), rel=0.1)


@pytest.mark.parametrize("saved", [False, True], ids=["masters, then rounding", "rounding, then masters"])
def test_a_run_with_masters_and_one_without_do_not_resume_each_other(
    tiny, train_tiny: Train, tmp_path: Path, saved: bool
) -> None:
    train_tiny(bf16(tiny, tmp_path, step_scheduler__max_steps=1, optimizer__stochastic_rounding=saved))
    said = "has no fp32 master of model.*stochastic_rounding: true" if saved else "holds an fp32 master of model"
    with pytest.raises(CheckpointError, match=said):
        train_tiny(bf16(tiny, tmp_path, optimizer__stochastic_rounding=not saved))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "model.torch_dtype is float32"),
        ({"model__torch_dtype": "bfloat16", "peft": {"r": 2}}, "adapters are trained in float32"),
    ],
)
def test_rounding_where_nothing_is_bf16_is_refused(tiny, tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.stochastic_rounding: .*{said}"):
        config_from_mapping(tiny.config(tmp_path, optimizer__stochastic_rounding=True, **changes))


def test_offloaded_weights_have_masters(tiny) -> None:
    plan = plan_model(ModelConfig(config=tiny.model))
    section = DistributedConfig(device="cpu", offload_policy="cpu")
    settings = NetworkSettings(plan, "bfloat16", None, False, section, OptimizerConfig(), 0)
    runtime = build_runtime(DistributedConfig(device="cpu"))
    assert masters_of(build_network(settings, runtime).optimizer)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_dry_run_counts_what_the_optimizer_holds(tiny, tiny_base: Path, rounding: bool, adapter: bool) -> None:
    config = config_from_mapping(
        tiny.config(
            Path("run"), optimizer__stochastic_rounding=rounding,
            model={"pretrained_model_name_or_path": str(tiny_base), "torch_dtype": "bfloat16"},
            **({"peft": {"r": 2, "modules_to_save": ["*.wte"]}} if adapter else {}),
        )
    ).config  # fmt: skip
    plan = plan_model(config.model)
    settings = NetworkSettings(plan, "bfloat16", config.peft, False, config.distributed, config.optimizer, 0)
    network = build_network(settings, build_runtime(config.distributed))
    hidden = network.model(torch.arange(8)[None], None)
    network.model.logits(hidden).float().logsumexp(-1).sum().backward()
    owners = {p: masters_of(network.optimizer).get(p, p) for p in network.model.parameters() if p.requires_grad}
    held = [owner.grad if owner.grad is not None else p.grad for p, owner in owners.items()]
    network.optimizer.step()
    counted = estimate_memory(config, plan, network.model)
    assert counted.gradients == sum(gradient.nbytes for gradient in held)
    assert counted.optimizer == sum(tensor.nbytes for tensor in moments(network).values() if tensor.dim())
    elements = counted.trainable
    if not adapter:
        assert counted.weights + counted.gradients + counted.optimizer == elements * (10 if rounding else 18)


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_rounding_beside_fp32_norms_alone_is_refused(tiny, tiny_base: Path, tmp_path: Path, words, capsys) -> None:
    values = tiny.config(
        tmp_path / "run", optimizer__stochastic_rounding=True, peft={"r": 2, "modules_to_save": ["*norm"]},
        model={"pretrained_model_name_or_path": str(tiny_base), "torch_dtype": "bfloat16"},
    )  # fmt: skip
    assert main(["train", "-c", str(tiny.write(tmp_path / "run.yaml", values)), *words]) == 2
    assert "optimizer.stochastic_rounding: rounds bfloat16 weights, and all that" in capsys.readouterr().err


def test_rounding_without_torchao_is_refused(tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("unmask.prepare.find_spec", lambda name: None)
    path = tiny.write(tmp_path / "run.yaml", bf16(tiny, tmp_path / "run", optimizer__stochastic_rounding=True))
    for words in ([], ["--dry-run"]):
        assert main(["train", "-c", str(path), *words]) == 2
        assert "optimizer.stochastic_rounding: needs torchao" in capsys.readouterr().err
