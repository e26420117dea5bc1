"""Ranks that share a network and answer different rows: a rank that needs no more calls helps the others with theirs.

A pass through a sharded network gathers every block from all ranks, so all must make the same number of passes, and
rows need different ones. Before each pass of its own a rank says that it works; a rank that is through with its rows
waits for that word and gathers along, with a pass over one token, until no rank works any more. What a pass computes
is each rank's own: ranks need not agree on anything but the number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unmask.distributed.ranks import Ranks
from unmask.models.registry import family_of


class JointCalls:
    """A context for passes through a sharded network without gradients; all ranks enter and leave it together.

    It may be entered any number of times, one after another. Passes may be made by any method of the network that runs
    each block once, in their order. A rank that leaves with an exception helps nobody: the run has failed.

    Args:
        model: sharded by `shard.shard_model`.
        ranks: all that share it.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        plan = family_of(model.config).shard
        self._first = next(model.get_submodule(plan.blocks).children())
        self._pass = model if plan.over_tokens is None else getattr(model, plan.over_tokens)
        self._model, self._ranks = model, ranks
        self._hook: Any = None

    def __enter__(self) -> JointCalls:
        # The embedding and the head are gathered by the first pass and stay: that is behind all ranks from here on.
        self._help()
        self._hook = self._first.register_forward_pre_hook(self._say, prepend=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hook.remove()
        if kind is not None:
            return
        while self._any_works(False):
            self._help()

    def _say(self, *_: object) -> None:
        self._any_works(True)

    def _any_works(self, own: bool) -> bool:
        return self._ranks.sum([float(own)])[0] > 0

    @torch.no_grad()
    def _help(self) -> None:
        self._pass(torch.zeros(1, 1, dtype=torch.long, device=next(self._model.parameters()).device))
