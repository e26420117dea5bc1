"""A network that answers on several ranks, whole on each or one copy that all share, and rows divided among them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from unmask.config.distributed import DistributedConfig
from unmask.distributed.processes import Degrees
from unmask.distributed.ranks import Ranks, build_meshes
from unmask.models.folders import find_adapter, read_generation
from unmask.models.loading import apply_adapter, empty_network
from unmask.models.lora.files import read_adapter
from unmask.models.registry import ModelPlan, family_of
from unmask.models.weights import base_tensors, fill, set_dtypes

Row = TypeVar("Row", bound=Hashable)
Result = TypeVar("Result")


def own_rows(rows: Sequence[Hashable], ranks: Ranks) -> list[int]:
    """Return the indices of this rank's rows, in their order.

    Equal rows go to one rank: what is drawn for a row may depend on how often it came before.
    """
    numbers: dict[Hashable, int] = {}
    for row in rows:
        numbers.setdefault(row, len(numbers))
    return [index for index, row in enumerate(rows) if numbers[row] % ranks.size == ranks.rank]


def divide_rows(
    rows: Sequence[Row],
    ranks: Ranks,
    function: Callable[[list[Row]], Sequence[Result]],
    together: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008 - has no state
) -> list[Result]:
    """Return a result for each row, computed by the rank whose row it is; the same list on every rank; a collective.

    Args:
        rows: all of them, equal on every rank.
        function: gives a picklable result for each of some rows; not called for none.
        together: a context for `function` that all ranks enter, those without rows too (`JointCalls`).
    """
    mine = own_rows(rows, ranks)
    with together:
        pairs = list(zip(mine, function([rows[index] for index in mine]), strict=True)) if mine else []
    results = {index: result for part in ranks.gather_results(pairs) for index, result in part}
    return [results[index] for index in range(len(rows))]


def load_shared(
    plan: ModelPlan, dtype: str | None, device: torch.device, adapter: str | None, ranks: Ranks
) -> nn.Module:
    """Build, shard and fill a network that is not trained; a collective.

    Every rank reads a part of the weights from the files and gathers a block when it runs.

    Args:
        dtype: `float32`, `bfloat16` or `float16`; None = as stored.
        adapter: folder of a LoRA adapter, or None.

    Raises:
        ModelError, TrainingError: weights that cannot be loaded; too little memory for a part.
    """
    # FSDP2 and what belongs to it take seconds to import, which one process need not wait for.
    from unmask.distributed.shard import adapter_tensors, allocate, load_tensors, pieces, shard_model, whole_adapter

    assert plan.folder is not None
    with torch.device("meta"):
        model = empty_network(plan.family, plan.config)
    model = set_dtypes(model, plan.folder, None if dtype is None else getattr(torch, dtype), plan.family.files)
    whole = adapter_folder = None
    if adapter is not None:
        adapter_folder = find_adapter(adapter)
        apply_adapter(model, adapter_folder)
        whole = whole_adapter(model)
        read_adapter(whole, adapter_folder)
    model.requires_grad_(False)
    meshes = build_meshes(Degrees(ranks.size), device.type, ranks.timeout)
    shard_model(model, DistributedConfig(), meshes)
    allocate(model, device, ranks, "use more processes")
    fill(base_tensors(pieces(model, meshes)), plan.folder, plan.family.files)
    if whole is not None:
        load_tensors(model, meshes, adapter_tensors(whole))
    model.generation = read_generation(plan.folder, adapter_folder)  # pyright: ignore[reportArgumentType]
    return model.eval()


class JointCalls:
    """A context in which ranks run a sharded network without gradients, each as often as its own rows need.

    A pass gathers every block from all ranks, so all must make equally many. Before each pass a rank announces it; a
    rank that has finished its rows joins every announced pass with one over a single token, until no rank has any left.

    All ranks enter and leave together, any number of times. Any method that runs each block once, in order, counts as a
    pass. A rank that leaves with an exception joins no further pass: the run has failed.

    Args:
        device: where the network runs, which its shards do not tell when they are offloaded.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        plan = family_of(model.config).shard
        self._first = next(model.get_submodule(plan.blocks).children())
        self._pass = model if plan.over_tokens is None else getattr(model, plan.over_tokens)
        self._ranks, self._device = ranks, device
        self._hook: Any = None

    def __enter__(self) -> JointCalls:
        # The first pass also gathers the embedding and the head, which stay gathered.
        self._join_pass()
        self._hook = self._first.register_forward_pre_hook(self._announce, prepend=True)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._hook.remove()
        if error_type is not None:
            return
        while self._any_running(False):
            self._join_pass()

    def _announce(self, *_: object) -> None:
        self._any_running(True)

    def _any_running(self, running: bool) -> bool:
        return self._ranks.sum([float(running)])[0] > 0

    @torch.no_grad()
    def _join_pass(self) -> None:
        self._pass(torch.zeros(1, 1, dtype=torch.long, device=self._device))
