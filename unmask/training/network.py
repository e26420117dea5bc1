"""A run's network and optimizer, on one process or shared by several: how they start, are restored and are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.config.distributed import DistributedConfig
from unmask.config.model import PeftConfig
from unmask.config.results import CheckpointConfig
from unmask.config.training import OptimizerConfig
from unmask.distributed.runtime import Runtime, prepare_model
from unmask.models.experts import freeze_routers
from unmask.models.folders import SHARDED
from unmask.models.loading import build_model, empty_network
from unmask.models.lora.files import is_trained
from unmask.models.registry import ModelPlan
from unmask.training.adapter_draw import draw_adapter
from unmask.training.lora import resolve_targets
from unmask.training.model_files import model_files, write_config, write_tokenizer
from unmask.training.optim import build_optimizer
from unmask.training.optimizer_state import load_optimizer
from unmask.training.saver import LocalSaver, Saver


@dataclass(frozen=True)
class NetworkSettings:
    """What a run's network is made from.

    Attributes:
        plan, dtype: the model and its master weights' dtype.
        peft: the adapter to train; None trains the network.
        freeze_router: routers of mixtures of experts are not trained.
        distributed, optimizer, checkpoint: those sections.
        seed: of fresh weights and adapters.
        root: the run directory.
        tokenizer, template: saved beside the weights, so that inference prompts as training did.
        run_config: YAML of the run, saved as config.yaml.
    """

    plan: ModelPlan
    dtype: str
    peft: PeftConfig | None
    freeze_router: bool
    distributed: DistributedConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    seed: int
    root: Path
    tokenizer: Any
    template: str
    run_config: str


@dataclass(frozen=True)
class Network:
    """A network ready to be trained.

    Attributes:
        model, optimizer: whole, or this rank's shards.
        restore: puts both back from a checkpoint's folder, whoever wrote it; with several ranks all call it.
        saver: makes the run's saver, given the checkpoint that it goes on from.
    """

    model: nn.Module
    optimizer: Optimizer
    restore: Callable[[Path], None]
    saver: Callable[[Path | None], Saver]


def build_network(settings: NetworkSettings, runtime: Runtime) -> Network:
    """Load or draw the network of a run; raises ModelError or ConfigError as loading and adapters do."""
    return _whole(settings, runtime) if runtime.meshes is None else _shared(settings, runtime)


def _whole(settings: NetworkSettings, runtime: Runtime) -> Network:
    if settings.peft is not None:
        # Refused before the weights are read.
        with torch.device("meta"):
            resolve_targets(settings.peft, empty_network(settings.plan.family, settings.plan.config))
    model = build_model(settings.plan, settings.dtype, seed=settings.seed)
    files = model_files(model, settings.plan, settings.peft, settings.tokenizer, settings.template, settings.run_config)
    draw_adapter(model, settings.seed)
    model = prepare_model(model, settings.distributed, runtime)
    if settings.freeze_router:
        freeze_routers(model)
    optimizer = build_optimizer(settings.optimizer, model)

    def trained() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            if settings.peft is None or is_trained(name):
                yield name, tensor

    def restore(folder: Path) -> None:
        if (folder / SHARDED).is_dir():
            from unmask.training.sharded_state import load_run

            load_run(trained(), model, optimizer, None, folder)
            return
        files.read(folder)
        load_optimizer(model, optimizer, folder)

    def saver(newest: Path | None) -> Saver:
        return LocalSaver(settings.root, settings.checkpoint, model, optimizer, files.write, newest)

    return Network(model, optimizer, restore, saver)


def _shared(settings: NetworkSettings, runtime: Runtime) -> Network:
    from unmask.training.sharded_model import build_shared
    from unmask.training.sharded_saver import ShardedSaver
    from unmask.training.sharded_state import load_plain_optimizer, load_run

    plan = settings.plan
    network = build_shared(plan, settings.dtype, settings.peft, settings.distributed, runtime, settings.seed)
    if settings.freeze_router:
        freeze_routers(network.model)
    optimizer = build_optimizer(settings.optimizer, network.model)

    def restore(folder: Path) -> None:
        if (folder / SHARDED).is_dir():
            load_run(network.trained(), network.model, optimizer, network.meshes, folder)
            return
        network.read_plain(folder)
        load_plain_optimizer(network.model, optimizer, network.meshes, folder)

    def write_beside(folder: Path) -> None:
        if settings.peft is None:
            write_config(plan, settings.dtype, folder)
        write_tokenizer(settings.tokenizer, settings.template, folder)
        (folder / "config.yaml").write_text(settings.run_config, encoding="utf-8")

    def saver(newest: Path | None) -> Saver:
        return ShardedSaver(settings.root, settings.checkpoint, network, optimizer, runtime.ranks, write_beside, newest)

    return Network(network.model, optimizer, restore, saver)
