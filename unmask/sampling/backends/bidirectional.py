"""The sampling backend of networks with bidirectional attention: every position sees the whole prompt and answer.

Every hidden state depends on every token, so by default each call is a full forward. The caches `prefix` and `dual`
reuse keys and values that are out of date: much shorter calls, approximate answers.

Shapes: B rows, P prompt columns, C answer columns, L columns of both, M scored positions, D width, V vocabulary rows,
R network rows (2B with guidance, a row's two side by side), K some of them, S columns of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.kv_cache import KeyValueStore
from unmask.ops.padding import concat_padded, padded
from unmask.sampling.backends.backend import Call, ModelSpec
from unmask.sampling.backends.replay import Function, replays_for
from unmask.sampling.backends.window import Window, forward_window, spans
from unmask.sampling.engine.state import Positions, send
from unmask.sampling.settings import SamplerSettings

# Fixed cost of a forward (launch, reading the weights), in positions that could be computed in that time.
_FORWARD_COST = 128
# The store, and padded rows that are recorded, have a multiple of so many columns, so that more calls are alike.
_COLUMNS = 64


@dataclass(frozen=True)
class Prompts:
    """The backend's context: the prompts of a batch, and the cache of keys and values.

    The store is None without a cache, and before the first call. It is written in place by calls and passes on to the
    next context, so that one from which another was made is used up.
    """

    ids_BP: Tensor  # int64, on the CPU, right-padded with 0; padding is never attended to
    lengths: tuple[int, ...]
    copies: int = 1  # rows of the network, and of the store, for each
    store: KeyValueStore | None = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], copies: int = 1) -> Prompts:
        """Return prompts of any lengths, 0 included, without a cache."""
        return cls(padded(prompts)[0], tuple(map(len, prompts)), copies)

    def select(self, keep_B: Tensor) -> Prompts:
        """Return the rows where `keep_B` (bool, on the CPU) is True, without columns that are now all padding."""
        lengths = tuple(length for length, keep in zip(self.lengths, keep_B.tolist(), strict=True) if keep)
        rows_R = keep_B.repeat_interleave(self.copies).nonzero()[:, 0]
        if self.store is not None and rows_R.tolist() != list(range(len(rows_R))):
            self.store.keep(rows_R.to(self.store.keys[0].device), self.store.columns)
        return Prompts(self.ids_BP[keep_B][:, : max(lengths, default=0)], lengths, self.copies, self.store)

    def concat(self, more: Prompts) -> Prompts:
        """Return these rows and then those of `more`; of a missing store the next call, a full forward, makes one."""
        lengths, store = self.lengths + more.lengths, self.store
        ours, theirs = (self.copies * len(prompts.lengths) for prompts in (self, more))
        if store is None and more.store is not None:
            heads = [(stored.shape[1], stored.shape[3]) for stored in more.store.keys]
            store = KeyValueStore.empty(heads, ours, more.store.columns, more.store.keys[0])
        if store is not None:
            store.reserve(ours + theirs, 0 if more.store is None else more.store.columns, _COLUMNS)
        if store is not None and more.store is not None:
            store.put(ours, more.store, theirs, more.store.columns)
        return Prompts(concat_padded([self.ids_BP, more.ids_BP]), lengths, self.copies, store)

    def with_answers(self, answer_BC: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return ids (B, L): each prompt, then the first `lengths[b]` tokens of its answer, then padding 0."""
        ids_BL = self.ids_BP.new_zeros(len(lengths), max(map(sum, zip(self.lengths, lengths, strict=True))))
        for row, (prompt, answer) in enumerate(zip(self.lengths, lengths, strict=True)):
            ids_BL[row, :prompt] = self.ids_BP[row, :prompt]
            ids_BL[row, prompt : prompt + answer] = answer_BC[row, :answer]
        return ids_BL


@dataclass(frozen=True)
class Forward:
    """A forward of some rows, all its tensors still on the host; the first three are arguments of `Replays`."""

    scope: object
    kind: Hashable
    function: Function
    inputs: tuple[Tensor, ...]
    scored: tuple[Tensor, Tensor]  # int64, the scored places of its output: rows and columns

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors to be sent to the device."""
        return (*self.inputs, *self.scored)


def forward_whole(model: Callable[..., Tensor], ids_KL: Tensor, lengths_K: Tensor | None = None) -> Tensor:
    """Run the network over whole rows; `lengths_K` are tokens of each, None = no padding."""
    if lengths_K is None:
        return model(ids_KL)
    return model(ids_KL, torch.arange(ids_KL.shape[1], device=ids_KL.device) < lengths_K[:, None])


class BidirectionalBackend:
    """Calls a bidirectional network: a full forward each time, or with cached keys and values (approximate).

    The first call of a block is a full forward whose keys and values are kept; the block's later calls compute with
    cache `prefix` the block and all behind it, with `dual` the block alone, and take every other position's from the
    store (Wu et al. 2025, Fast-dLLM, arXiv 2505.22618, section 3.2). What is kept is out of date from the first token
    that is committed. Rows of one batch may be at different calls of different blocks.

    Of the settings `cache`, `refresh_interval` and `cfg_scale` are read; guidance doubles the rows of a call.
    """

    self_conditioning = None

    def __init__(self, model: Any, settings: SamplerSettings) -> None:
        config = model.config
        self.model = model
        self.cache, self.refresh_interval = settings.cache, settings.refresh_interval
        self.cfg_scale = settings.cfg_scale or 0.0
        self.copies = 2 if self.cfg_scale else 1  # network rows for each row
        self._like = next(model.parameters())
        self.device = self._like.device
        self._replays = replays_for(model)
        padding = () if config.pad_token_id == config.eos_token_id else (config.pad_token_id,)
        self.spec = ModelSpec(
            mask_id=config.mask_token_id,
            banned_ids=(config.mask_token_id, *padding),
            eos_ids=(config.eos_token_id,),
            vocab_size=config.vocab_size,
            rows=config.rows,
            max_length=config.max_sequence_length,
        )

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prompts:
        """Pad the prompts on the right; the network is not called."""
        return Prompts.of(prompts, self.copies)

    @torch.no_grad()
    def denoise(self, context: Prompts, call: Call) -> tuple[Tensor, Positions, Prompts]:
        """Run the network; hidden states are (M, D), with guidance (M, 2, D): with the prompt, and with it masked.

        Several forwards where rows compute windows of unlike length (`length_groups`).
        """
        ids_BL = context.with_answers(call.answer_BC, call.lengths)
        prompts_B = torch.tensor(context.lengths)
        lengths_B = prompts_B + torch.tensor(call.lengths)
        columns_M = prompts_B[call.rows_M] + call.positions.column_M
        ids_RL = self._with_unconditional(ids_BL, prompts_B)
        store = None
        first_B, end_B = torch.zeros_like(lengths_B), lengths_B
        if self.cache != "none":
            store = context.store or self._empty_store()
            store.reserve(len(ids_RL), ids_RL.shape[1], _COLUMNS)
            due_B = call.step_B % (self.refresh_interval or torch.iinfo(torch.int64).max) == 0  # a full forward is due
            first_B = torch.where(due_B, first_B, prompts_B + call.first_B)
            if self.cache == "dual":
                end_B = torch.where(due_B, end_B, torch.minimum(prompts_B + call.end_B, lengths_B))
        context = replace(context, store=store)
        forwards, order = [], []
        for group in length_groups(tuple((end_B - first_B).tolist())):
            rows_K = torch.tensor(group)
            within_B = torch.full_like(lengths_B, -1).index_put((rows_K,), torch.arange(len(group)))
            of_group_N = (within_B[call.rows_M] >= 0).nonzero()[:, 0]
            rows_N = call.rows_M[of_group_N]
            scored = (within_B[rows_N], columns_M[of_group_N] - first_B[rows_N])
            forwards.append(
                self._forward(store, ids_RL, rows_K, first_B[rows_K], end_B[rows_K], lengths_B[rows_K], scored)
            )
            order.append(of_group_N)
        host = [call.positions.tensor_5M, torch.cat(order).argsort()]
        positions_5M, order_M, *sent = send(
            [*host, *(each for forward in forwards for each in forward.tensors)], self.device
        )
        found = []
        for forward in forwards:
            here, sent = sent[: len(forward.tensors)], sent[len(forward.tensors) :]
            found.append(self._run(forward, here))
        hidden_MD = found[0] if len(found) == 1 else torch.cat(found)[order_M]
        return hidden_MD, Positions(*positions_5M), context

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Return logits (M, V); with guidance of scale s, u + (s + 1)(c - u), where u has the prompt masked."""
        if not self.cfg_scale:
            return self.model.logits(hidden_MD)
        conditional_MV, unconditional_MV = (self.model.logits(hidden) for hidden in hidden_MD.unbind(dim=1))
        return unconditional_MV + (self.cfg_scale + 1) * (conditional_MV - unconditional_MV)

    def commit(
        self, context: Prompts, answer_BC: Tensor, first_B: Tensor, end_B: Tensor, completed_B: Tensor
    ) -> Prompts:
        """Return the context as it is: hidden states change with every later token, so keeping any would be inexact."""
        return context

    def _empty_store(self) -> KeyValueStore:
        config = self.model.config
        return KeyValueStore.empty([(config.kv_heads, config.head_dim)] * config.n_layers, 0, 0, self._like)

    def _with_unconditional(self, ids_BL: Tensor, prompts_B: Tensor) -> Tensor:
        """Return the network's rows (R, L): with guidance, each row followed by a copy with its prompt masked."""
        if not self.cfg_scale:
            return ids_BL
        in_prompt_BL = torch.arange(ids_BL.shape[1]) < prompts_B[:, None]
        unconditional_BL = ids_BL.masked_fill(in_prompt_BL, self.model.config.mask_token_id)
        return torch.stack((ids_BL, unconditional_BL), dim=1).flatten(0, 1)

    def _forward(
        self,
        store: KeyValueStore | None,
        ids_RL: Tensor,
        rows_K: Tensor,
        first_K: Tensor,
        end_K: Tensor,
        lengths_K: Tensor,
        scored: tuple[Tensor, Tensor],
    ) -> Forward:
        """Return the forward of the columns [first, end) of some rows, guided rows twice; reads nothing on the device.

        Positions count from each row's own first token, which stands in column 0.
        """
        model = self.model
        first_K, end_K, lengths_K = (each_K.repeat_interleave(self.copies) for each_K in (first_K, end_K, lengths_K))
        rows_K = (rows_K[:, None] * self.copies + torch.arange(self.copies)).flatten()
        ids_KL, width = ids_RL[rows_K, : int(lengths_K.max())], int((end_K - first_K).max())
        ragged = bool(lengths_K.min() < ids_KL.shape[1])  # else no mask, which leaves SDPA its fast kernels
        pads = self._replays.pads(len(ids_KL) * width, self.device)
        if pads and ragged and width == ids_KL.shape[1]:
            width = min(-(-width // _COLUMNS) * _COLUMNS, self.spec.max_length)
        if store is None:
            ids_KL = F.pad(ids_KL, (0, width - ids_KL.shape[1]))
            inputs = (ids_KL, lengths_K) if ragged else (ids_KL,)
            return Forward(None, "whole", lambda *tensors: forward_whole(model, *tensors), inputs, scored)
        rows = None if len(rows_K) == len(ids_RL) else rows_K.tolist()
        positions_KS = spans(first_K, end_K, width)
        window = Window.of(store, positions_KS, lengths_K.tolist(), rows, store.columns if pads else None)

        def run(ids_KS: Tensor, *tensors: Tensor) -> Tensor:
            return forward_window(model, ids_KS, window.with_tensors(tensors))

        inputs = (ids_KL.gather(1, positions_KS), *window.tensors)
        return Forward(store.addresses, window.layout, run, inputs, scored)

    def _run(self, forward: Forward, sent: Sequence[Tensor]) -> Tensor:
        """Run a forward on its tensors as sent to the device; return what it scores, (M, D) or guided (M, 2, D)."""
        *inputs, rows_M, columns_M = sent
        hidden_KSD = self._replays(forward.scope, forward.kind, forward.function, *inputs)
        if not self.cfg_scale:
            return hidden_KSD[rows_M, columns_M]
        return torch.stack((hidden_KSD[2 * rows_M, columns_M], hidden_KSD[2 * rows_M + 1, columns_M]), dim=1)


@lru_cache(maxsize=256)
def length_groups(lengths: tuple[int, ...], forward: int = _FORWARD_COST) -> tuple[tuple[int, ...], ...]:
    """Split rows into groups, each padded to its longest row and run as one forward, at least total cost.

    Args:
        lengths: positions of each row; padding costs as much as any position.
        forward: fixed cost of a group, in positions.

    Returns:
        ascending row indices of each group, groups by ascending length; at equal cost the fewest groups.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    # Of the first n rows in this order: the least cost, the number of groups, and where the last group starts.
    best = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(
            min((best[start][0] + (end - start) * longest + forward, best[start][1] + 1, start) for start in range(end))
        )
    groups: list[tuple[int, ...]] = []
    end = len(order)
    while end:
        start = best[end][2]
        groups.append(tuple(sorted(order[start:end])))
        end = start
    return tuple(reversed(groups))
