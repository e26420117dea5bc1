"""Expert parallelism: each rank of an `ep` group holds some experts, and tokens travel to the experts they chose.

A token goes to every expert that the router chose, however unevenly that falls out; nothing is dropped or padded. Per
layer and pass there are two exchanges of tokens and one of counts; the counts are the only thing that the host waits
for, because it has to know how much comes from whom (torch.distributed._functional_collectives).

Shapes: N tokens of this rank, D width, E experts of the whole group, H experts held here, P ranks of the group, T
experts a token, M = N · T pairs sent, R pairs received.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd

from unmask.models.experts import Dispatch, sort_by_expert
from unmask.ops.rows import inverse, take_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def narrow_experts(experts: nn.Module, rank: int, size: int) -> None:
    """Cut every parameter of a mixture of experts down to this rank's experts, in place; dimension 0 counts experts.

    Args:
        experts: the module, adapters of experts among its parameters; on any device, the meta device included.
        rank, size: this rank's place in its `ep` group, and the group's size.
    """
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            held = len(parameter) // size
            own = parameter.detach()[rank * held : (rank + 1) * held].clone()
            setattr(module, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


def expert_dispatch(group: ProcessGroup) -> Dispatch:
    """Return the dispatch for experts that are shared out over the ranks of a group, rank p holding the p-th run."""
    size = dist.get_world_size(group)

    def dispatch(hidden_ND: Tensor, experts_NT: Tensor, weights_NT: Tensor, experts: nn.Module) -> Tensor:
        """As `experts.local_dispatch`, to which it is equal: each pair's expert and the order of sums are the same."""
        tokens, choices = experts_NT.shape
        held = len(next(experts.parameters()))  # FSDP2 shards over other ranks than these: the length is the whole one
        order_M, counts_E = sort_by_expert(experts_NT, held * size)
        # counts_PH[p, h]: pairs that rank p sends to the h-th expert here.
        counts_PH = all_to_all_single(counts_E, None, None, group).view(size, held)
        sent = counts_E.view(size, held).sum(dim=1)
        to_host = torch.stack((sent, counts_PH.sum(dim=1))).tolist()
        send, receive = ([int(count) for count in row] for row in to_host)
        received_RD = all_to_all_single_autograd(take_rows(hidden_ND, order_M // choices), receive, send, group)
        by_expert_R = _by_expert(counts_PH, sum(receive))
        mixed_RD = experts(received_RD.index_select(0, by_expert_R), counts_PH.sum(dim=0))
        by_sender_RD = mixed_RD.index_select(0, inverse(by_expert_R))
        mixed_MD = all_to_all_single_autograd(by_sender_RD, send, receive, group)
        mixed_NTD = mixed_MD.index_select(0, inverse(order_M)).view(tokens, choices, -1)
        return (mixed_NTD * weights_NT[..., None]).sum(dim=1).to(hidden_ND.dtype)

    return dispatch


def _by_expert(counts_PH: Tensor, rows: int) -> Tensor:
    """Return the order in which `rows` rows that come sorted by (rank, expert) are sorted by expert, int64 (R,)."""
    ranks, held = counts_PH.shape
    expert_PH = torch.arange(held, device=counts_PH.device).expand(ranks, held)
    # With the length given, the device is not asked for it.
    return expert_PH.flatten().repeat_interleave(counts_PH.flatten(), output_size=rows).argsort(stable=True)
